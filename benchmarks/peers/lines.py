"""A process that takes commands and tells tokens in lines of JSON (`stage.py`), and the contenders that are one."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.model import Precision, bench_model
from benchmarks.peers.contender import Contender, FailedError, Layout, Mend, nothing
from benchmarks.peers.weights import SPLIT, WHOLE, stages_of
from resplit import leash

READY_S = 120.0
STOP_S = 10.0
HERE = Path(__file__).parent


class Teller:
    """The process: leashed, so that it cannot outlive this one, nor what it starts itself."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self._command, self._log = [str(word) for word in command], log
        self._process: Process | None = None
        self._number = 0

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def descendants(self) -> list[int]:
        """Every process that it started, and they."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        return []

    async def __aenter__(self) -> Self:
        tether = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tether, *self._command, stdin=PIPE, stdout=PIPE, stderr=log, start_new_session=True
            )
        try:
            async with asyncio.timeout(READY_S):
                await self._answer()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        started = [psutil.Process(pid) for pid in self.descendants()]
        self._process.stdin.close()  # the end of its commands is the end of it
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        for process in psutil.wait_procs(started, timeout=2)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async def tell(self, **command: Any) -> dict[str, Any]:
        """Its word on a command that tells no tokens. Raises `FailedError`."""
        self._send(command)
        return await self._answer()

    async def tokens(self, **command: Any) -> AsyncGenerator[int, None]:
        """The tokens that it tells; whoever leaves early ends it. Raises `FailedError`."""
        self._send(command)
        told: dict[str, Any] = {}
        try:
            while "token" in (told := await self._answer()):
                yield int(told["token"])
        finally:
            if "done" not in told and self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGUSR1)

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._number += 1
        self._process.stdin.write(json.dumps({"id": self._number, **command}).encode() + b"\n")

    async def _answer(self) -> dict[str, Any]:
        """The next line on the last command; what it still said on one that was given up is passed over."""
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            told: dict[str, Any] = json.loads(line)
            if "error" in told and told["id"] == self._number:
                raise FailedError(str(told["error"]))
            if told["id"] == self._number:
                return told
        raise FailedError("its process died")


@contextlib.asynccontextmanager
async def onnxruntime(folder: Path, precision: Precision, scratch: Path) -> AsyncIterator[list[Contender]]:
    """The uncut graph in one session, driven by a loop in its process: nothing serves it."""
    whole = _written(folder, precision, scratch / "onnxruntime")[WHOLE]
    async with Teller([sys.executable, HERE / "stage.py", whole], scratch / "onnxruntime" / "log") as process:

        def stream(prompt: Sequence[int], new_tokens: int) -> AsyncGenerator[int, None]:
            return process.tokens(op="answer", prompt=list(prompt), new_tokens=new_tokens)

        async def stages() -> list[int]:
            return [process.pid]

        yield [Contender("ONNX Runtime, one session", "onnxruntime", "whole", stream, stages)]


@contextlib.asynccontextmanager
async def ray(
    folder: Path, precision: Precision, scratch: Path, python: Path, layouts: Collection[Layout]
) -> AsyncIterator[list[Contender]]:
    """One actor with the whole model, two with half each, called in a loop and as a compiled graph, as asked for."""
    files = _written(folder, precision, scratch / "ray")
    chains = [layout for layout in (SPLIT, WHOLE) if layout in layouts]
    command = [python, HERE / "ray_driver.py", *(files[name] for name in chains)]
    async with Teller(command, scratch / "ray" / "log") as process:
        every: set[int] = set()

        def contender(name: str, layout: Layout, way: str) -> Contender:
            chain = chains.index(layout)

            def stream(prompt: Sequence[int], new_tokens: int) -> AsyncGenerator[int, None]:
                return process.tokens(op="answer", chain=chain, way=way, prompt=list(prompt), new_tokens=new_tokens)

            async def stages() -> list[int]:
                pids: list[int] = (await process.tell(op="pids", chain=chain))["pids"]
                every.update(pids)
                return pids

            async def compile_() -> None:
                await process.tell(op="compile", chain=chain)

            async def tear_down() -> None:
                await process.tell(op="tear_down", chain=chain)

            async def restart() -> None:
                await process.tell(op="restart", chain=chain)
                if way == "compiled":
                    await compile_()

            async def wait() -> None:
                await stages()

            mends = [Mend("Ray starting the actor again", wait)]
            if way == "compiled":
                mends.append(Mend("the graph compiled again", compile_))
            return Contender(
                name,
                "ray",
                layout,
                stream,
                stages,
                others=lambda: [pid for pid in (process.pid, *process.descendants()) if pid not in every],
                ready=compile_ if way == "compiled" else nothing,
                rest=tear_down if way == "compiled" else nothing,
                mends=(*mends, Mend("every actor started again", restart)),
            )

        ways: list[tuple[str, Layout, str]] = [
            ("Ray, one actor", WHOLE, "loop"),
            ("Ray, two actors", SPLIT, "loop"),
            ("Ray, two actors, compiled graph", SPLIT, "compiled"),
        ]
        found = [contender(*way) for way in ways if way[1] in layouts]
        for one in found:  # so that it is known which processes are actors of which
            await one.stages()
        yield found


async def margin(folder: Path, precision: Precision, scratch: Path, **case: Any) -> tuple[float, float]:
    """`stage.margin` of the uncut graph."""
    stages = _written(folder, precision, scratch / "margin")[WHOLE]
    async with Teller([sys.executable, HERE / "stage.py", stages], scratch / "margin" / "log") as process:
        told = await process.tell(op="margin", **case)
    return told["margin"], told["spread"]


def _written(folder: Path, precision: Precision, scratch: Path) -> dict[str, Path]:
    """For each way to cut, the file that describes its stages."""
    scratch.mkdir(parents=True, exist_ok=True)
    found = {}
    store, digest, _ = bench_model(folder, precision)
    for name, stages in stages_of(store, store.manifest(digest), scratch).items():
        found[name] = scratch / f"{name}.json"
        found[name].write_text(json.dumps(stages))
    return found
