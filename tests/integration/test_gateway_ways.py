"""Who a gateway lets in, what it shows to whom, and how it ends: its keys, its metrics, its restart."""

import asyncio
import base64
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from models.store import Store
from resplit.child import Child
from resplit.cluster import free_port
from resplit.gateway.api_keys import add_key
from resplit.gateway.app import GatewayConfig
from resplit.gateway.serving import Listening, parse_listen, serve
from schemas.errors import ResplitError
from tests.integration.cluster_fixtures import CHAT, PROMPT, Oracle, command
from tests.integration.gateway_fixtures import Front, busy_front, openai_client

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASKED: dict[str, Any] = {"model": CHAT, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def front(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Front]:
    async with busy_front(tmp_path_factory.mktemp("ways") / "cluster", zoo_store, oracle) as found:
        yield found


@asynccontextmanager
async def gateway(front: Front, folder: Path, *options: str, watch: bool = True) -> AsyncIterator[tuple[str, Child]]:
    """One more gateway to the same cluster: its URL, and its process."""
    cluster, port = front.serving.cluster, free_port()
    arguments = ["gateway", "--listen", f"127.0.0.1:{port}", "--url", cluster.url, "--keys", str(cluster.client_keys)]
    watching = ["--watch-keys", str(cluster.observer_keys)] if watch else []
    child = Child("gateway", [sys.executable, "-m", "resplit", *arguments, *watching, *options], folder / "log")
    await child.start()
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient() as client, asyncio.timeout(20):
            while True:
                try:
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                except httpx2.TransportError:
                    assert child.pid is not None, child.tail()
                    await asyncio.sleep(0.05)
        yield url, child
    finally:
        await child.stop()


async def test_api_keys(front: Front, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    everything = add_key(file, "ops", None, watch=True)
    narrow = add_key(file, "app", ("elsewhere",), watch=False)
    async with gateway(front, tmp_path, "--api-keys", str(file)) as (url, _):
        async with openai_client(url, "rsp-wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai_client(url, narrow) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.completions.create(model=CHAT, prompt=PROMPT, max_tokens=2)
            assert [model.id async for model in client.models.list()] == []
        async with openai_client(url, everything) as client:
            assert (await client.completions.create(model=CHAT, prompt=PROMPT, max_tokens=2)).id
        async with httpx2.AsyncClient(base_url=url) as http:
            for path in ("/metrics", "/dashboard/", "/dashboard/watch", "/dashboard/why"):
                bare = await http.get(path)
                assert bare.status_code == 401
                assert "Basic" in bare.headers["www-authenticate"]
                assert (await http.get(path, headers=_basic(narrow))).status_code == 403
            assert (await http.get("/dashboard/", headers=_basic(everything))).status_code == 200
            assert (await http.post("/v1/completions", json=ASKED)).status_code == 401
            assert (await http.post("/v2/models/cnn/infer", json={})).status_code == 401
            # A key that is taken out opens nothing any more, and one that is put in does.
            file.write_text("")
            late = add_key(file, "late", None, watch=False)
            assert (await http.post("/v1/completions", json=ASKED, headers=_bearer(everything))).status_code == 401
            assert (await http.post("/v1/completions", json=ASKED, headers=_bearer(late))).status_code == 200
            file.write_text("keys = [")  # a slip of the pen locks nobody out, and lets nobody in
            assert (await http.post("/v1/completions", json=ASKED, headers=_bearer(late))).status_code == 200
            assert (await http.post("/v1/completions", json=ASKED, headers=_bearer(everything))).status_code == 401


async def test_a_key_is_drawn_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    status, key, _ = await command("api-key", "app", "--file", str(file), "--model", "chat")
    assert status == 0
    assert key.startswith("rsp-")
    assert key.strip() not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    status, _, error = await command("api-key", "app", "--file", str(file))
    assert status == 2
    assert "already" in error
    status, _, error = await command("api-key", "a b", "--file", str(file))
    assert status == 2


async def test_what_is_not_safe_is_refused_at_the_start(front: Front, tmp_path: Path) -> None:
    cluster = front.serving.cluster
    common = ["gateway", "--url", cluster.url, "--keys", str(cluster.client_keys)]
    add_key(tmp_path / "keys.toml", "app", None, watch=False)
    keyed = ["--listen", "0.0.0.0:0", "--api-keys", str(tmp_path / "keys.toml")]
    for options, code, word in (
        (["--listen", "0.0.0.0:0"], 4, "--api-keys"),
        (keyed, 4, "--tls-certificate"),
        (["--listen", "nowhere"], 2, "HOST:PORT"),
        (["--tls-certificate", "x"], 2, "--tls-key"),
    ):
        status, _, error = await command(*common, *options)
        assert status == code
        assert error.startswith("error: ")
        assert word in error
    config = GatewayConfig(cluster.url, cluster.client_keys)
    taken = Listening(*parse_listen(front.url.removeprefix("http://")))
    free = Listening("127.0.0.1", 0)
    missing = tmp_path / "missing"
    for wrong, at, field in (
        (config, taken, "listen"),
        (replace(config, api_keys=missing), free, "file"),
        (replace(config, watch_keys=cluster.client_keys), free, "keys"),
        (replace(config, keys=cluster.observer_keys), free, "keys"),
        (config, replace(free, certificate=missing, key=missing), "tls"),
    ):
        with pytest.raises(ResplitError) as refusal:
            await serve(wrong, at)
        assert refusal.value.field == field


async def test_metrics_are_read_by_prometheus(front: Front) -> None:
    before = await _metrics(front.url)
    for _ in range(3):
        await front.openai.completions.create(model=CHAT, prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True})
    await front.http.post("/v1/completions", json={**ASKED, "model": "made-up-by-a-client"})
    after = await _metrics(front.url)

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after.get(key, 0.0) - before.get(key, 0.0)

    about = {"gen_ai_operation_name": "text_completion", "gen_ai_request_model": CHAT}
    assert grown("gen_ai_server_request_duration_seconds_count", **about, error_type="") == 3
    assert grown("gen_ai_server_time_to_first_token_seconds_count", **about) == 3
    assert grown("gen_ai_server_time_per_output_token_seconds_count", **about) == 3
    assert grown("gen_ai_client_token_usage_sum", **about, gen_ai_token_type="output") == 15
    unknown = {**about, "gen_ai_request_model": "unknown", "error_type": "unknown_deployment"}
    assert grown("gen_ai_server_request_duration_seconds_count", **unknown) == 1
    assert not any("made-up" in str(key) for key in after)
    assert after["resplit_gateway_requests_running", frozenset()] == 0


async def test_without_an_observer_it_answers_and_shows_nothing(front: Front, tmp_path: Path) -> None:
    async with gateway(front, tmp_path, watch=False) as (url, _), httpx2.AsyncClient(base_url=url) as http:
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200
        assert (await http.get("/dashboard/")).status_code == 403
        assert (await http.get("/v1/models")).json()["data"] == []


async def test_what_is_sealed_is_answered_too(front: Front, tmp_path: Path) -> None:
    async with gateway(front, tmp_path, "--sealed") as (url, _), openai_client(url) as client:
        found = await client.completions.create(
            model=CHAT, prompt=PROMPT, max_tokens=4, extra_body={"ignore_eos": True}
        )
    assert found.choices[0].text == front.serving.oracle.text.decode(front.serving.oracle.tokens(PROMPT, 4))


async def test_told_to_stop_it_finishes_what_it_began(front: Front, tmp_path: Path, oracle: Oracle) -> None:
    async with gateway(front, tmp_path) as (url, child), openai_client(url) as client:
        watching = asyncio.create_task(_first_events(url))
        await asyncio.sleep(0.3)
        pieces: list[str] = []
        async for chunk in await client.completions.create(
            model=CHAT, prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        ):
            if not pieces:
                child.signal(signal.SIGTERM)
            pieces.append(chunk.choices[0].text)
        assert "".join(pieces) == oracle.text.decode(oracle.tokens(PROMPT, 200))
        assert await asyncio.wait_for(child.ended(), 10) == 0
        assert "past" in await watching, "who watches is sent away, and comes back by itself"


async def test_a_socket_of_systemd_outlives_the_gateway(front: Front, tmp_path: Path) -> None:
    """systemd listens, and hands the socket over: requests that come between two lives of a gateway wait."""
    cluster = front.serving.cluster
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        program = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
            "os.execv(sys.executable, [sys.executable, '-m', 'resplit', *sys.argv[2:]])"
        )
        arguments = ["gateway", "--url", cluster.url, "--keys", str(cluster.client_keys)]
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, str(listener.fileno()), *arguments, pass_fds=[listener.fileno()]
            )
            try:
                async with httpx2.AsyncClient(base_url=url, timeout=20) as http:
                    assert (await http.post("/v1/completions", json=ASKED)).status_code == 200
            finally:
                process.terminate()
                assert await asyncio.wait_for(process.wait(), 10) == 0


async def _first_events(url: str) -> list[str]:
    found = []
    async with httpx2.AsyncClient(base_url=url, timeout=20) as http, http.stream("GET", "/dashboard/watch") as response:
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                found.append(line.removeprefix("event: "))
    return found


async def _metrics(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    async with httpx2.AsyncClient(base_url=url) as http:
        page = (await http.get("/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


async def test_bodies_that_are_too_large_or_asked_of_another_name_are_turned_away(front: Front) -> None:
    large = b'{"model": "chat", "prompt": "' + b"a" * (5 << 20) + b'"}'
    asked = {"Content-Type": "application/json"}

    async def trickled() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for content in (large, trickled()):
        try:
            found = await front.http.post("/v1/completions", content=content, headers=asked)
        except httpx2.TransportError:
            continue  # it was told, and the rest of it met a closed connection
        assert found.status_code == 413
        assert found.json()["error"]["resplit_code"] == "payload_too_large"
    for path in ("/v1/models", "/dashboard/", "/metrics"):
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            found = await front.http.get(path, headers={"Host": host})
            assert found.status_code in (400, 403)
    for host in ("localhost", "LOCALHOST:8000", "[::1]:9", "127.0.0.1"):
        assert (await front.http.get("/v1/models", headers={"Host": host})).status_code == 200
    status, _ = await front.post("/v1/completions", {**ASKED, "prompt": "a" * (2 << 20)})
    assert status == 413, "the wire takes a megabyte"


async def test_who_reads_nothing_is_taken_to_be_gone(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many streams that nobody reads: once the sockets are full, the requests end, and the gateway holds nothing."""
    from resplit.gateway import connections  # noqa: PLC0415

    monkeypatch.setattr(connections, "QUIET_S", 0.2)
    written = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            written.set()
            await asyncio.Event().wait()  # the client's window is full

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.set()

    closed = asyncio.Event()
    await asyncio.wait_for(connections.EventStream(endless())({"type": "http"}, receive, send), 10)
    assert written.is_set()
    assert closed.is_set()


async def test_pages_from_elsewhere_and_bodies_of_another_kind_are_turned_away(front: Front) -> None:
    """What a browser sends without asking first is no request: not of another type, nor in the name of another page."""
    data = b'{"model": "chat", "prompt": "a", "max_tokens": 1}'
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        found = await front.http.post("/v1/completions", content=data, headers=kind)
        assert (found.status_code, found.json()["error"]["param"]) == (400, "Content-Type")
    kind = {"Content-Type": "application/json; charset=utf-8"}
    for origin, status in (
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
    ):
        for path in ("/v1/completions", "/v2/models/chat/infer"):
            found = await front.http.post(path, content=data, headers={**kind, "Origin": origin})
            assert found.status_code == (status if path.startswith("/v1") or status == 403 else 400)


async def test_a_key_is_looked_at_before_anything_is_read(front: Front, tmp_path: Path) -> None:
    add_key(tmp_path / "keys.toml", "app", None, watch=False)
    async with (
        gateway(front, tmp_path, "--api-keys", str(tmp_path / "keys.toml")) as (url, _),
        httpx2.AsyncClient(base_url=url) as http,
    ):
        for path in ("/v1/completions", "/v2/models/cnn/infer", "/nowhere"):
            found = await http.post(path, content=b"{", headers={"Content-Type": "application/json"})
            assert found.status_code == 401
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 200


async def test_a_head_without_end_ends_the_connection(front: Front) -> None:
    host, port = front.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(20):
            while True:
                writer.write(b"a" * (1 << 16))
                await writer.drain()
                await asyncio.sleep(0)
    writer.close()
    with pytest.raises(ConnectionError):
        await reader.read()
