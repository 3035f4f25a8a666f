"""A trace that begins at an HTTP client goes through the gateway, the bus and every stage, to a real OTLP receiver."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from models.store import Store
from resplit.client import Client
from schemas.audit import AuditKind
from tests.integration.cluster_fixtures import CHAT, PROMPT, Oracle
from tests.integration.gateway_fixtures import Front, busy_front

pytestmark = pytest.mark.asyncio(loop_scope="session")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """Takes spans as an OpenTelemetry collector does, and keeps them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        """With the name of the service instance that sent each."""
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                for group in ExportTraceServiceRequest.FromString(data).resource_spans:
                    named = {one.key: one.value.string_value for one in group.resource.attributes}
                    for scope in group.scope_spans:
                        spans.extend((named["service.instance.id"], span) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    async def until(self, count: int) -> dict[str, tuple[str, Span]]:
        """By span id, once there are so many of the trace."""
        async with asyncio.timeout(20):
            while True:
                found = {
                    span.span_id.hex(): (who, span) for who, span in list(self.spans) if span.trace_id.hex() == TRACE
                }
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def front(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle, receiver: Receiver
) -> AsyncIterator[Front]:
    with pytest.MonkeyPatch.context() as patch:  # for the processes that are started
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        async with busy_front(tmp_path_factory.mktemp("traces") / "cluster", zoo_store, oracle) as found:
            yield found


async def test_every_stage_is_in_the_trace_of_whoever_asks(front: Front, receiver: Receiver) -> None:
    body = {"model": CHAT, "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = await front.http.post("/v1/completions", json=body, headers=headers)
    request = answer.headers["x-request-id"]
    ended = await front.serving.ear.wait(AuditKind.REQUEST_ENDED, request=request)
    assert ended.fields["trace"] == TRACE, "who reads the trail finds the trace"
    # Caches are kept for a next turn: a stage's part ends with them, and another conversation ends them.
    async with asyncio.timeout(60):
        while not {"stage n0", "stage n1", "stage n2"} <= {span.name for _, span in receiver.spans}:
            prompts = [f"{number} other words, of a length that needs a slot" * 3 for number in range(8)]
            await asyncio.gather(*(front.serving.client.complete(CHAT, one, max_tokens=2) for one in prompts))
            await asyncio.sleep(0.3)
    found = await receiver.until(5)
    [(ingress, root)] = [(who, span) for who, span in found.values() if span.name == f"text_completion {CHAT}"]
    assert ingress.startswith("n")
    assert _attributes(root)["gen_ai.usage.output_tokens"] == 6
    assert [event.name for event in root.events] == ["first token"]
    for node, blocks in (("n0", [0, 1]), ("n1", [2, 3]), ("n2", [4, 5])):
        [(who, stage)] = [(who, span) for who, span in found.values() if span.name == f"stage {node}"]
        assert who == node
        assert stage.parent_span_id == root.span_id
        assert _attributes(stage)["resplit.blocks"] == blocks
        assert _attributes(stage)["resplit.calls"] >= 6
    # From the ingress up to the client, span by span, through the gateway.
    parent = root.parent_span_id.hex()
    above = []
    while parent != PARENT:
        who, span = found[parent]
        above.append(who)
        parent = span.parent_span_id.hex()
    assert set(above) == {"gateway"}


async def test_what_is_not_traced_makes_no_spans_in_the_cluster(front: Front, receiver: Receiver) -> None:
    before = {span.span_id for _, span in receiver.spans}
    request: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
    for header in (None, "x", f"00-{'0' * 32}-{'0' * 16}-01", f"00-{'z' * 32}-{'y' * 16}-01", "x" * 55, "y" * 5000):
        headers = {} if header is None else {"traceparent": header}
        async with Client(
            front.serving.cluster.url, keys=front.serving.cluster.client_keys, headers=partial(dict, headers)
        ) as client:
            assert (await client.complete(CHAT, **request)).finish_reason
    await asyncio.sleep(1.0)
    fresh = [span.name for who, span in receiver.spans if span.span_id not in before and who != "gateway"]
    assert [name for name in fresh if not name.startswith("stage")] == []


def _attributes(span: Span) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        found = getattr(one, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {one.key: value(one.value) for one in span.attributes}
