"""A cloud on loopback: a real HTTP server that answers with the whole models, or misbehaves as it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.integration.cluster_fixtures import Oracle

KEY = "sk-of-the-test"
Mood = Literal["well", "slow", "nonsense", "busy", "refusing", "endless"]


@dataclass
class Cloud:
    """What it was asked, and how it answers."""

    oracle: Oracle
    port: int = 0
    mood: Mood = "well"
    asked: list[tuple[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    came: threading.Event = field(default_factory=threading.Event)
    """Once anything was asked."""
    free: threading.Event = field(default_factory=threading.Event)
    """Until this is set, who finds it slow waits."""
    computing: threading.Lock = field(default_factory=threading.Lock)

    def file(self, folder: Path, **more: Any) -> Path:
        """A file that names it `eu`, and what speaks the other protocol `oip`."""
        key = folder / "eu.key"
        key.write_text(f"{KEY}\n")
        key.chmod(0o600)
        at = f"http://127.0.0.1:{self.port}"
        own = {"url": f"{at}/v1", "key_file": "eu.key", "price_prompt": 1.0, "price_output": 2.0, **more}
        tables = {"eu": own, "oip": {"url": at, "protocol": "oip", "price_request": 0.5}}
        lines = [
            line
            for name, table in tables.items()
            for line in (f"[clouds.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
        ]
        path = folder / "clouds.toml"
        path.write_text("\n".join(lines))
        return path

    def answer(self, path: str, said: Any) -> Any:
        """What is said to a request, computed."""
        with self.computing:
            match path:
                case "/v1/completions" | "/v1/chat/completions":
                    return self._completion(path, said)
                case "/v1/embeddings":
                    vectors = [self.oracle.vector(text).tolist() for text in said["input"]]
                    return {"data": [{"index": i, "embedding": one} for i, one in enumerate(vectors)]}
                case "/v2/models/cnn/infer":
                    given = said["inputs"][0]
                    classes = self.oracle.classes(np.array(given["data"], np.float32).reshape(given["shape"]))
                    output = {"name": "classes", "shape": list(classes.shape), "datatype": "FP32"}
                    return {"model_name": "cnn", "outputs": [{**output, "data": classes.reshape(-1).tolist()}]}
        raise KeyError(path)

    def _completion(self, path: str, said: Any) -> Any:
        prompt = said["prompt"] if path == "/v1/completions" else said["messages"][-1]["content"]
        text = self.oracle.text.decode(self.oracle.tokens(prompt, said["max_tokens"]))
        usage = {"prompt_tokens": 1000, "completion_tokens": 2000, "total_tokens": 3000}
        message = {"text": text} if path == "/v1/completions" else {"message": {"role": "assistant", "content": text}}
        return {"choices": [{"index": 0, "finish_reason": "length", **message}], "usage": usage}


@contextmanager
def cloud_server(oracle: Oracle) -> Iterator[Cloud]:
    """A cloud on a free port."""
    cloud = Cloud(oracle)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            cloud.asked.append((self.path, said))
            cloud.came.set()
            cloud.keys.add(self.headers.get("Authorization"))
            match cloud.mood:
                case "slow":
                    cloud.free.wait(60)
                case "nonsense":
                    return self._say(200, b'{"choices": [{"finish_reason": "stop", "text": 7}]}')
                case "busy":
                    return self._say(503, b"come back later")
                case "refusing":
                    return self._say(401, b'{"error": {"message": "who are you?"}}')
                case "endless":
                    return self._say(200, b" " * (9 << 20))
            return self._say(200, json.dumps(cloud.answer(self.path, said)).encode())

        def _say(self, status: int, body: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # whoever asked does not wait any more

        def log_message(self, format: str, *args: Any) -> None:
            """The tests say what they want to know."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cloud.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        cloud.free.set()
        server.shutdown()
        server.server_close()
