"""How fast, how soon and with how much memory each contender answers, all up at once and asked in turn."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.model import Precision
from benchmarks.paired import median_interval
from benchmarks.peers.contender import (
    Answer,
    Asked,
    Contender,
    FailedError,
    Layout,
    cpu_s,
    memory_bytes,
)
from benchmarks.peers.install import Installed
from benchmarks.peers.lines import margin, onnxruntime, ray
from benchmarks.peers.llama import TWO_SERVERS, WHOLE, half_remote, llama
from benchmarks.peers.ours import resplit
from benchmarks.peers.weights import gguf_of, layers, weight_bytes
from benchmarks.table import Row
from schemas.errors import ResplitError

PROMPT_TOKENS = 256
NEW_TOKENS: dict[Precision, int] = {"int4": 48, "int8": 48, "fp32": 24}
WARM_TOKENS = 64
"""Of the prompt before anything is measured."""
PATIENCE_S = 120.0
SPARE_BYTES = 1 << 30
"""Left to everything else on the machine."""
OURS, THEIRS, ALONE = "resplit", "llama.cpp", "onnxruntime"
TIMES_THEIRS = 1.3
"""Of llama.cpp's tokens per second split, what ours are to be at 4 bits."""


@dataclass(frozen=True)
class Group:
    """Contenders that come up together."""

    name: str
    missing: str | None
    """Why it cannot take part, if so."""
    copies: int
    """Of the weights, that it has in memory."""
    enter: Callable[[], AbstractAsyncContextManager[list[Contender]]]


def groups(folder: Path, precision: Precision, installed: Installed, scratch: Path) -> list[Group]:
    """Everybody. In float32 there is no memory for who has the whole model beside ONNX Runtime and llama.cpp."""
    layouts: tuple[Layout, ...] = ("split",) if precision == "fp32" else ("whole", "split")
    found = [
        Group("ONNX Runtime", None, 1, lambda: onnxruntime(folder, precision, scratch)),
        Group("Resplit", None, len(layouts), lambda: resplit(folder, precision, scratch, layouts)),
    ]
    for way in (WHOLE, TWO_SERVERS, half_remote(layers(folder))):

        def enter(way=way) -> AbstractAsyncContextManager[list[Contender]]:  # type: ignore[no-untyped-def]
            return llama(installed.llama_bin, gguf_of(folder, precision, installed.python), way, scratch)

        found.append(Group(way.name, installed.missing("llama.cpp"), 1, enter))
    found.append(
        Group(
            "Ray",
            installed.missing("ray"),
            len(layouts),
            lambda: ray(folder, precision, scratch, installed.python, layouts),
        )
    )
    return found


@dataclass(frozen=True)
class Heard:
    """An answer, and the processor time that a token after the first took of all processes of its system."""

    answer: Answer
    cpu_ms: float


@dataclass
class Meeting:
    """Everybody who came, and what each has said so far: as much is there as was done when time was up."""

    contenders: list[Contender] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    heard: dict[str, list[Heard]] = field(default_factory=dict)
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)

    async def round(self, prompt: list[int], new_tokens: int) -> None:
        """One prompt to all, each time another first."""
        turn = len(self.prompts) % len(self.contenders)
        self.prompts.append(prompt)
        for one in (*self.contenders[turn:], *self.contenders[:turn]):
            heard = await _heard(one, prompt, new_tokens)
            self.memory[one.name] = await _memory(one)
            self.heard.setdefault(one.name, []).append(heard)


async def measure(
    folder: Path, precision: Precision, installed: Installed, scratch: Path, rounds: int, budget_s: float
) -> list[Row]:
    """A row for each contender, one for each that was skipped, and one for each target.

    No round begins after `budget_s`; the one under way is given up after half as much again.
    """
    until = time.monotonic() + budget_s
    skipped: list[Row] = []
    meeting = Meeting()
    async with AsyncExitStack() as stack:
        for group in groups(folder, precision, installed, scratch):
            why = group.missing or _no_room(group.copies * weight_bytes(folder, precision))
            if why is None:
                try:
                    meeting.contenders += await stack.enter_async_context(group.enter())
                except (FailedError, ResplitError, TimeoutError, OSError) as error:
                    why = f"did not start: {error}"
            if why is not None:
                skipped.append({"part": precision, "name": group.name, "skipped": why})
        draw = random.Random(precision)
        with suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic() + budget_s / 2):
                for one in meeting.contenders:
                    await _heard(one, _prompt(draw, WARM_TOKENS), NEW_TOKENS[precision])
                while len(meeting.prompts) < rounds and (not meeting.prompts or time.monotonic() < until):
                    await meeting.round(_prompt(draw, PROMPT_TOKENS), NEW_TOKENS[precision])
    answers = {one.name: [each.answer for each in meeting.heard.get(one.name, ())] for one in meeting.contenders}
    rows = [_row(precision, one, meeting, answers) for one in meeting.contenders]
    await _explain(rows, answers, meeting.prompts, folder, precision, scratch)
    return [*rows, *skipped, *targets(precision, rows)]


async def _heard(contender: Contender, prompt: list[int], new_tokens: int) -> Heard:
    pids = [*await contender.stages(), *contender.others()]
    await contender.ready()
    asked = Asked(contender, prompt, new_tokens, PATIENCE_S)
    await asked.reached(1)
    before, tokens = cpu_s(pids), len(asked.ids)
    answer = await asked.answer()
    cpu_ms = 1e3 * (cpu_s(pids) - before) / max(1, len(answer.ids) - tokens)
    await contender.rest()
    return Heard(answer, cpu_ms)


def _prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(2, 32000) for _ in range(tokens)]


def _no_room(needed: int) -> str | None:
    available = psutil.virtual_memory().available
    if available >= needed + SPARE_BYTES:
        return None
    return f"it needs {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free"


async def _memory(contender: Contender) -> tuple[float, float]:
    """MB of what computes, and of all that it needs."""
    stages = memory_bytes(await contender.stages())
    return stages / 1e6, (stages + memory_bytes(contender.others())) / 1e6


def _row(
    precision: Precision,
    contender: Contender,
    meeting: Meeting,
    answers: dict[str, list[Answer]],
) -> Row:
    found = answers[contender.name]
    row: Row = {
        "part": precision,
        "name": contender.name,
        "system": contender.system,
        "layout": contender.layout,
    }
    if not found:
        return {**row, "skipped": "time was up before it was asked"}
    memory = meeting.memory[contender.name]
    errors = [answer.error for answer in found if answer.error is not None]
    if errors:
        return {**row, "skipped": f"it answered with an error: {errors[0]}"}
    row |= {
        "tokens_per_s": round(statistics.median(answer.tokens_per_s for answer in found), 2),
        "ttft_s": round(statistics.median(answer.ttft_s for answer in found), 3),
        "cpu_ms": round(statistics.median(one.cpu_ms for one in meeting.heard[contender.name]), 1),
        "stages_mb": round(memory[0]),
        "memory_mb": round(memory[1]),
        "rounds": len(found),
        "each_tokens_per_s": [round(answer.tokens_per_s, 2) for answer in found],
        "each_ttft_s": [round(answer.ttft_s, 3) for answer in found],
    }
    whole = _whole_of(contender, meeting.contenders)
    if whole is not None and answers[whole] and not any(answer.error for answer in answers[whole]):
        pairs = list(zip(found, answers[whole], strict=False))
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in pairs]
        low, high = median_interval(ratios)
        row |= {
            "over_whole": round(statistics.median(ratios), 3),
            "over_whole_low": round(low, 3),
            "over_whole_high": round(high, 3),
            "ttft_over_whole": round(statistics.median(one.ttft_s / other.ttft_s for one, other in pairs), 3),
        }
    return row


def _whole_of(contender: Contender, contenders: list[Contender]) -> str | None:
    """Whom it is held against: llama.cpp's own server, and of what ONNX Runtime computes its bare session."""
    base = THEIRS if contender.system == THEIRS else ALONE
    names = [one.name for one in contenders if one.system == base and one.layout == "whole"]
    return names[0] if names and names[0] != contender.name else None


async def _explain(
    rows: list[Row],
    answers: dict[str, list[Answer]],
    prompts: list[list[int]],
    folder: Path,
    precision: Precision,
    scratch: Path,
) -> None:
    """Say of each row how many tokens are those of the bare session; where they part, how near the two tokens were."""
    bases = [row["name"] for row in rows if row["system"] == ALONE and "skipped" not in row]
    for row in rows:
        if "skipped" in row or not bases:
            continue
        alike = []
        for number, (ours, theirs) in enumerate(zip(answers[bases[0]], answers[row["name"]], strict=False)):
            pairs = list(zip(ours.ids, theirs.ids, strict=False))
            parted = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
            alike.append(len(pairs) if parted is None else parted)
            if parted is not None and "parted" not in row:
                case = {"prompt": prompts[number], "ids": list(ours.ids[:parted]), "other": theirs.ids[parted]}
                apart, spread = await margin(folder, precision, scratch, **case)
                row["parted"] = {"at": parted, "margin": round(apart, 5), "spread": round(spread, 3)}
        row["same_tokens"] = alike
        row["of_tokens"] = NEW_TOKENS[precision]


def targets(precision: Precision, rows: list[Row]) -> list[Row]:
    """What was aimed at, and whether it was reached."""
    split = [row for row in rows if row["layout"] == "split" and "over_whole" in row]
    ours = [row for row in split if row["system"] == OURS]
    theirs = [row for row in split if row["system"] == THEIRS]
    if not ours or not theirs:
        return []
    ratio, other = ours[0]["over_whole"], max(row["over_whole"] for row in theirs)
    found: list[Row] = [
        {
            "part": precision,
            "target": "split / whole ahead of llama.cpp RPC's",
            "ours": ratio,
            "theirs": other,
            "met": ratio > other,
        }
    ]
    if precision == "int4":
        rate, other = ours[0]["tokens_per_s"], max(row["tokens_per_s"] for row in theirs)
        found.append(
            {
                "part": precision,
                "target": f"tokens/s split >= {TIMES_THEIRS} times llama.cpp RPC's",
                "ours": rate,
                "theirs": other,
                "met": rate >= TIMES_THEIRS * other,
            }
        )
    return found
