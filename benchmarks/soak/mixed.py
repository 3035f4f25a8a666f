"""What is asked beside the streams of the fault matrix: short and long, text and tensors, over the bus and HTTP, some
of it cancelled and some of it left."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError
from onnx import TensorProto, helper, numpy_helper

from benchmarks.faults.load import DEPLOYMENT, SILENCE_S, TEMPERATURE, Uncut
from benchmarks.soak.verdict import Request
from bus.credentials import inbox_prefix
from bus.together import CLIENT
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from resplit.client import Client
from resplit.gateway.openai_replies import PREFIX
from resplit.replies import RequestError
from schemas.base import DeploymentName

TENSORS = DeploymentName("layers")
LAYERS, WIDTH = 6, 64
WORKERS = 3
PAUSE_S = (0.05, 0.6)
SUMS = 12
SHORT_TOKENS, LONG_TOKENS = 16, 200
HTTP_S = 60.0
"""Silence that is borne: a step of a kind that was never timed is suspect after half a minute."""
LEAVERS = f"{inbox_prefix('client', CLIENT)}.left"
"""Nobody else hears what comes to those who leave: the server is to find nobody there."""


@dataclass(frozen=True)
class Sum:
    """A prompt and what the uncut model answers; `seed` is None where it does so greedily."""

    prompt: str
    seed: int | None
    tokens: tuple[int, ...]
    text: str

    @property
    def fields(self) -> dict[str, Any]:
        return {} if self.seed is None else {"temperature": TEMPERATURE, "seed": self.seed}


@dataclass(frozen=True)
class Layers:
    """A row of numbers and what the uncut layers make of it."""

    given: bytes
    found: np.ndarray


def sums(store: Store) -> tuple[Sum, ...]:
    """Short answers; every second one is sampled."""
    uncut = Uncut(store)
    found = []
    for i in range(SUMS):
        prompt, seed = f"{31 * i + 7}+{i * i * 5 + 11}=", None if i % 2 == 0 else 100 + i
        tokens = uncut.tokens(prompt, seed, SHORT_TOKENS, stop_at_eos=True)
        found.append(Sum(prompt, seed, tokens, uncut.text(tokens)))
    return tuple(found)


def layers(store: Store, folder: Path) -> tuple[Layers, ...]:
    """Import a chain of small layers as `TENSORS`; some rows with what they become."""
    draw = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for i in range(LAYERS):
        weight = draw.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]))
        name = "y" if i == LAYERS - 1 else f"h{i}"
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [name]))
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [1, WIDTH]) for end in ("x", "y")]
    graph = helper.make_graph(nodes, TENSORS, ends[:1], ends[1:], weights)
    path = folder / f"{TENSORS}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    import_model(str(path), store, TENSORS)
    reference = Reference(store, TENSORS)
    rows = [draw.normal(0, 1, (1, WIDTH)).astype(np.float32) for _ in range(4)]
    return tuple(Layers(row.tobytes(), reference.run({"x": row})["y"]) for row in rows)


Ask = Callable[[str], Awaitable[str]]


@dataclass(eq=False)
class Mixed:
    """Workers that each ask one thing after the other, whatever is drawn."""

    client: Client
    leaver: Nats
    http: httpx2.AsyncClient
    sums: Sequence[Sum]
    layers: Sequence[Layers]
    draw: random.Random
    asked: list[Request] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    """Those that only who left heard of."""
    _goes_on: bool = True

    @asynccontextmanager
    async def running(self, ends_s: float) -> AsyncIterator[None]:
        """Ask while the block runs; then until all has ended, for `ends_s` at most."""
        working = [asyncio.create_task(self._work()) for _ in range(WORKERS)]
        try:
            yield
        finally:
            self._goes_on = False
            _, late = await asyncio.wait(working, timeout=ends_s)
            for task in late:
                task.cancel()
        for task in working:
            if task not in late:
                task.result()  # a defect of the benchmark

    async def _work(self) -> None:
        kinds: tuple[tuple[str, str, Ask], ...] = (
            ("sum", "output", self._sum),
            ("sum", "output", self._sum),
            ("tensors", "output", self._tensors),
            ("tensors", "output", self._tensors),
            ("HTTP, whole", "output", self._http_whole),
            ("HTTP, streamed", "output", self._http_streamed),
            ("HTTP, left", "left", self._http_left),
            ("cancelled", "cancelled", self._cancelled),
            ("given up", "left", self._given_up),
            ("left", "left", self._left),
            ("too late", "deadline_exceeded", self._too_late),
        )
        while self._goes_on:
            kind, meant, ask = self.draw.choice(kinds)
            at = len(self.asked)
            self.asked.append(Request(uuid.uuid4().hex, kind, time.monotonic(), None, "not ended", meant))
            try:
                outcome = await ask(self.asked[at].request_id)
            except RequestError as error:
                outcome = str(error.code)
            except (httpx2.HTTPError, NatsError, OSError) as error:
                outcome = type(error).__name__
            if ":" in outcome:  # HTTP: what the gateway called it
                outcome, request_id = outcome.split(":")
                self.asked[at] = replace(self.asked[at], request_id=request_id)
            self.asked[at] = replace(self.asked[at], ended=time.monotonic(), outcome=outcome)
            await asyncio.sleep(self.draw.uniform(*PAUSE_S))

    async def _sum(self, request_id: str) -> str:
        one = self.draw.choice(self.sums)
        answer = await self.client.complete(
            DEPLOYMENT, one.prompt, max_tokens=SHORT_TOKENS, request_id=request_id, **one.fields
        )
        return "output" if answer.token_ids == one.tokens else "wrong"

    async def _tensors(self, request_id: str) -> str:
        one = self.draw.choice(self.layers)
        given = ([1, WIDTH], "FP32", one.given)
        answer = await self.client.infer_tensors(TENSORS, {"x": given}, request_id=request_id)
        data = answer.outputs["y"].data
        assert isinstance(data, bytes)
        found = np.frombuffer(data, np.float32)
        return "output" if np.allclose(found, one.found.reshape(-1), atol=1e-5) else "wrong"

    async def _cancelled(self, request_id: str) -> str:
        """By somebody who only knows its name."""
        after = self.draw.randint(1, 60)
        count = 0
        async for _ in self._long(request_id):
            count += 1
            if count == after:
                await self.client.cancel(request_id)
        return "output"

    async def _given_up(self, request_id: str) -> str:
        """By its reader, who says so."""
        left = self.draw.randint(1, 60)
        async with aclosing(self._long(request_id)) as tokens:
            async for _ in tokens:
                left -= 1
                if left == 0:
                    return "left"
        return "output"

    async def _too_late(self, request_id: str) -> str:
        async for _ in self.client.stream(
            DEPLOYMENT, self.sums[0].prompt, max_tokens=LONG_TOKENS, ignore_eos=True, request_id=request_id,
            deadline_ms=self.draw.choice((30.0, 300.0)),
        ):  # fmt: skip
            pass
        return "output"

    async def _left(self, request_id: str) -> str:
        """By its reader, who says nothing."""
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def note(message: Any) -> None:
            heard.put_nowait(message.data)

        body = {"prompt": self.sums[0].prompt, "max_tokens": LONG_TOKENS, "ignore_eos": True, "stream": True}
        inbox = f"{LEAVERS}.{request_id}"
        listening = await self.leaver.subscribe(inbox, cb=note)
        try:
            data = json.dumps({**body, "request_id": request_id}).encode()
            await self.leaver.publish(f"resplit.v1.infer.{DEPLOYMENT}", data, inbox)
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    for _ in range(self.draw.randint(1, 60)):
                        reply = json.loads(await heard.get() or b"{}")
                        if reply.get("status") == "accepted":
                            self.accepted.add(request_id)
                        if not reply or "error" in reply or "finish_reason" in reply:
                            break
        finally:
            with suppress(NatsError, OSError):
                await listening.unsubscribe()
        return "left"

    async def _http_whole(self, _: str) -> str:
        one = self.draw.choice(self.sums)
        answer = await self.http.post("/v1/completions", json=self._body(one))
        if answer.status_code != 200:
            return _refusal(answer)
        body = answer.json()
        outcome = "output" if body["choices"][0]["text"] == one.text else "wrong"
        return f"{outcome}:{body['id'].removeprefix(PREFIX['text'])}"

    async def _http_streamed(self, _: str) -> str:
        one = self.draw.choice(self.sums)
        said, name = "", ""
        async with self.http.stream("POST", "/v1/completions", json={**self._body(one), "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return _refusal(answer)
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return f"{chunk['error']['resplit_code']}:{name or chunk['error'].get('request_id') or '-'}"
                name = chunk["id"].removeprefix(PREFIX["text"])
                said += "".join(choice["text"] for choice in chunk["choices"])
        return f"{'output' if said == one.text else 'wrong'}:{name}"

    async def _http_left(self, _: str) -> str:
        left = self.draw.randint(1, 40)
        body = {"model": DEPLOYMENT, "prompt": self.sums[0].prompt, "max_tokens": LONG_TOKENS, "ignore_eos": True}
        name = "-"
        async with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and "error" not in line[:12]:
                    name = json.loads(line.removeprefix("data: "))["id"].removeprefix(PREFIX["text"])
                left -= 1
                if left <= 0:
                    break
        return f"left:{name}"

    def _long(self, request_id: str) -> Any:
        return self.client.stream(
            DEPLOYMENT, self.sums[0].prompt, max_tokens=LONG_TOKENS, ignore_eos=True, request_id=request_id
        )

    def _body(self, one: Sum) -> dict[str, Any]:
        return {"model": DEPLOYMENT, "prompt": one.prompt, "max_tokens": SHORT_TOKENS, **one.fields}


def _refusal(answer: httpx2.Response) -> str:
    error = answer.json()["error"]
    return f"{error['resplit_code']}:{error['request_id'] or '-'}"
