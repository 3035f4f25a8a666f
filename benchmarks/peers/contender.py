"""Who takes part: a way to ask for an answer, the processes that give it, and how what was killed is brought back."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

Layout = Literal["whole", "split"]


class FailedError(Exception):
    """A contender answered with an error, or went away."""


@dataclass(frozen=True)
class Mend:
    """A step that brings a contender back after its stage was killed."""

    word: str
    do: Callable[[], Awaitable[None]]


async def nothing() -> None:
    """It needs nothing."""


@dataclass(frozen=True)
class Contender:
    """One system with the model whole or split, up and ready."""

    name: str
    system: str
    layout: Layout
    stream: Callable[[Sequence[int], int], AsyncGenerator[int, None]]
    """The tokens of a greedy answer to a prompt, so many, as they come. Raises `FailedError`."""
    stages: Callable[[], Awaitable[list[int]]]
    """The processes that compute, first stage first."""
    others: Callable[[], list[int]] = list
    """Processes that it needs beside them."""
    ready: Callable[[], Awaitable[None]] = nothing
    """Before it is asked, not counted."""
    rest: Callable[[], Awaitable[None]] = nothing
    """Before others are asked: what it does without being asked is not to be at their cost."""
    mends: tuple[Mend, ...] = ()
    """What can be done after a kill, the least first."""


@dataclass(frozen=True)
class Answer:
    """What came of a question; times are seconds since it was asked."""

    ids: tuple[int, ...]
    arrivals: tuple[float, ...]
    ended_s: float
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0]

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def longest_wait_s(self, since: float) -> float:
        """For a token that came after `since`."""
        waits = [after - before for before, after in itertools.pairwise((0.0, *self.arrivals)) if after > since]
        return max(waits, default=0.0)


class Asked:
    """A question under way: what has come of it so far can be waited for."""

    def __init__(self, contender: Contender, prompt: Sequence[int], new_tokens: int, patience_s: float) -> None:
        self.ids: list[int] = []
        self.arrivals: list[float] = []
        self.began = time.monotonic()
        self._task = asyncio.create_task(self._run(contender, prompt, new_tokens, patience_s))

    async def reached(self, tokens: int) -> None:
        """Wait until so many tokens have come, or it has ended."""
        while len(self.ids) < tokens and not self._task.done():  # noqa: ASYNC110 - a millisecond is near enough
            await asyncio.sleep(0.001)

    async def answer(self) -> Answer:
        """Wait for its end."""
        return await self._task

    async def give_up(self) -> None:
        """End it where it is."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, contender: Contender, prompt: Sequence[int], new_tokens: int, patience_s: float) -> Answer:
        error = None
        try:
            async with contextlib.aclosing(contender.stream(prompt, new_tokens)) as tokens:
                while len(self.ids) < new_tokens:
                    token = await asyncio.wait_for(anext(tokens), patience_s)
                    self.arrivals.append(time.monotonic() - self.began)
                    self.ids.append(token)
        except FailedError as failed:
            error = str(failed)
        except StopAsyncIteration:
            error = f"it ended after {len(self.ids)} of {new_tokens} tokens"
        except TimeoutError:
            error = f"nothing for {patience_s:g} s"
        return Answer(tuple(self.ids), tuple(self.arrivals), time.monotonic() - self.began, error)


async def ask(contender: Contender, prompt: Sequence[int], new_tokens: int, patience_s: float) -> Answer:
    """Ask and wait for the end; nothing at all for `patience_s` ends it, too."""
    return await Asked(contender, prompt, new_tokens, patience_s).answer()


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time that these processes have taken."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def memory_bytes(pids: Sequence[int]) -> int:
    """What these processes keep in memory: their share of what is shared, and all of a mapped model file that is in
    memory, whoever else maps it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            maps = psutil.Process(pid).memory_maps()
            total += sum(one.rss if one.path.endswith(".gguf") else one.pss for one in maps)
    return total
