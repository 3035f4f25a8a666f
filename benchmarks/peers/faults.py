"""What becomes of an answer, and of the next one, when the process of the last stage is killed, hangs or gets slow."""

import asyncio
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.changes import slow
from benchmarks.model import Precision
from benchmarks.peers.contender import Asked, Contender, FailedError, Layout, Mend, ask
from benchmarks.peers.install import Installed
from benchmarks.peers.lines import ray
from benchmarks.peers.llama import TWO_SERVERS, llama
from benchmarks.peers.ours import planned
from benchmarks.peers.weights import gguf_of
from benchmarks.table import Row
from schemas.errors import ResplitError

PART = "faults"
PRECISION: Precision = "int4"
PROMPT_TOKENS = 64
NEW_TOKENS = 96
SPLIT_ONLY: tuple[Layout, ...] = ("split",)
AT_TOKENS = (8, 40)
"""The fault comes after so many tokens, drawn anew for each run."""
AGAIN_TOKENS = 4
PATIENCE_S = 15.0
"""A caller who hears nothing for so long gives up."""
SLOW_TOKENS = 1500
STEADY_S, SLOW_S, WINDOW_S = 4.0, 20.0, 4.0
"""How long tokens are counted before, for how long the stage is slow, and what of that counts at its end."""


@dataclass(frozen=True)
class Run:
    """One fault: what the caller saw, and what it took until the next answer."""

    outcome: str
    heard_s: float
    """The longest wait for a token after the fault, if the answer went on; else from the fault until the caller had
    the error, or gave up."""
    mended_by: str
    answers_s: float
    """From the fault until there were tokens again: of the answer itself, or else of the next one, whatever had to be
    done for it included."""


def patients(
    folder: Path, installed: Installed, scratch: Path
) -> list[tuple[str, str | None, Callable[[], AbstractAsyncContextManager[list[Contender]]]]]:
    """Who is hurt: a name, why it cannot be if so, and how it comes up."""
    return [
        ("Resplit", None, lambda: planned(folder, PRECISION, scratch)),
        (
            TWO_SERVERS.name,
            installed.missing("llama.cpp"),
            lambda: llama(installed.llama_bin, gguf_of(folder, PRECISION, installed.python), TWO_SERVERS, scratch),
        ),
        ("Ray", installed.missing("ray"), lambda: ray(folder, PRECISION, scratch, installed.python, SPLIT_ONLY)),
    ]


async def measure(folder: Path, installed: Installed, scratch: Path, runs: int, budget_s: float) -> AsyncIterator[Row]:
    """A row for each contender and fault. Of what takes too long there are fewer runs, but one."""
    wanted = patients(folder, installed, scratch)
    until = time.monotonic()
    for name, missing, enter in wanted:
        until += budget_s / len(wanted)
        if missing is not None:
            yield {"part": PART, "name": name, "skipped": missing}
            continue
        try:
            async with enter() as contenders:
                share = (until - time.monotonic()) / len(contenders)
                for contender in contenders:
                    async for row in _hurt(contender, runs, time.monotonic() + share):
                        yield row
        except (FailedError, ResplitError, TimeoutError, OSError) as error:
            yield {"part": PART, "name": name, "skipped": f"given up: {error}"}


async def _hurt(contender: Contender, runs: int, until: float) -> AsyncIterator[Row]:
    await contender.ready()
    draw = random.Random(0)
    prompt = [draw.randrange(2, 32000) for _ in range(PROMPT_TOKENS)]
    whole = await ask(contender, prompt, NEW_TOKENS, PATIENCE_S)
    if whole.error is not None:
        yield {"part": PART, "name": contender.name, "skipped": f"it answered with an error: {whole.error}"}
        return
    for fault, number in (("killed", signal.SIGKILL), ("hangs", signal.SIGSTOP)):
        found: list[Run] = []
        while len(found) < runs and (not found or time.monotonic() < until):
            found.append(await _once(contender, prompt, whole.ids, number, draw.randint(*AT_TOKENS)))
        yield {
            "part": PART,
            "name": contender.name,
            "fault": fault,
            "runs": len(found),
            "outcomes": [run.outcome for run in found],
            "mended_by": [run.mended_by for run in found],
            "heard_s": [round(run.heard_s, 2) for run in found],
            "answers_s": [round(run.answers_s, 2) for run in found],
        }
    yield {"part": PART, "name": contender.name, "fault": "slow", **await _slowed(contender, prompt)}
    await contender.rest()


async def _once(
    contender: Contender, prompt: list[int], expected: tuple[int, ...], number: signal.Signals, after_tokens: int
) -> Run:
    """One fault in one answer, and the way back. What hangs goes on once nothing else helps, and in the end."""
    victim = (await contender.stages())[-1]
    asked = Asked(contender, prompt, NEW_TOKENS, PATIENCE_S)
    await asked.reached(after_tokens)
    os.kill(victim, number)
    at = time.monotonic()
    answer = await asked.answer()
    if answer.error is None:
        outcome = "went on, same tokens" if answer.ids == expected else "went on, other tokens"
        heard_s = answer.longest_wait_s(at - asked.began)
    else:
        outcome, heard_s = answer.error, asked.began + answer.ended_s - at
    steps = contender.mends
    if number is signal.SIGSTOP:

        async def go_on() -> None:
            os.kill(victim, signal.SIGCONT)

        steps = (Mend("what hung going on", go_on), *steps)
    mended_by, again_s = await _mended(contender, steps, prompt, expected, at)
    if number is signal.SIGSTOP:
        await go_on()
    if contender.mends and number is signal.SIGKILL and mended_by == "nothing":
        await contender.mends[-1].do()  # for the next run everything is to be as it was
    return Run(outcome, heard_s, mended_by, heard_s if answer.error is None else again_s)


async def _mended(
    contender: Contender, steps: tuple[Mend, ...], prompt: list[int], expected: tuple[int, ...], at: float
) -> tuple[str, float]:
    """What has to be done until it answers again, as it did before, and how long after the fault that is."""
    word = "nothing"
    for mend in (None, *steps):
        if mend is not None:
            word = mend.word
            try:
                await mend.do()
            except (FailedError, ResplitError, TimeoutError, OSError):
                continue
        asked = Asked(contender, prompt, AGAIN_TOKENS, PATIENCE_S)
        answer = await asked.answer()
        if answer.ids == expected[:AGAIN_TOKENS]:
            return word, asked.began + answer.ttft_s - at
    raise FailedError(f"{contender.name} did not answer again, whatever was done")


async def _slowed(contender: Contender, prompt: list[int]) -> Row:
    """Tokens per second before the last stage gets a third of its time, at first, and at the end of that."""
    victim = (await contender.stages())[-1]
    asked = Asked(contender, prompt, SLOW_TOKENS, PATIENCE_S)
    await asked.reached(2)
    began = time.monotonic()
    await asyncio.sleep(STEADY_S)
    at = time.monotonic()
    slowing = asyncio.create_task(slow(victim, random.Random(0)))
    await asyncio.sleep(SLOW_S)
    end = time.monotonic()
    slowing.cancel()
    await asyncio.wait([slowing])
    await asked.give_up()
    arrivals = [asked.began + arrival for arrival in asked.arrivals]

    def rate(first: float, last: float) -> float:
        return round(sum(first < arrival <= last for arrival in arrivals) / (last - first), 2)

    before, first, last = rate(began, at), rate(at, at + WINDOW_S), rate(end - WINDOW_S, end)
    waits = [later - earlier for earlier, later in itertools.pairwise(arrivals) if later > at]
    return {
        "runs": 1,
        "before_tokens_per_s": before,
        "slowed_tokens_per_s": first,
        "at_end_tokens_per_s": last,
        "recovered": round(last / before, 2) if before else None,
        "longest_wait_s": round(max(waits), 2) if waits else None,
        "median_wait_s": round(statistics.median(waits), 3) if waits else None,
    }
