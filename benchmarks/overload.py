"""More than a cluster can do: what still comes in time, who waits, and how soon the others are told.

    python -m benchmarks.overload [--seconds S] [--seed N]

A cluster of three agents serves the adder in two stages. First its capacity: as many requests at a time as it has
slots, one after the other. Then arrivals by Poisson at 0.1 to 5 times that, whatever becomes of those before. There are
three classes: interactive (a deadline, before others), standard (a later one) and batch (none; it counts where it ends
within `BATCH_S`). Deadlines are multiples of what a request takes alone. *Goodput* are requests that end within their
class's bound, a second. A request is answered by one message: TTFT and the time per token are what the ingress
measured, from its arrival; how soon a refusal comes is what who asked saw.

Who asks is a process of its own, which says how late it was and which share of a core it took.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError

from benchmarks.faults.load import DEPLOYMENT
from benchmarks.faults.measure import quantile
from benchmarks.table import Row, report
from bus.identity import load_credentials
from resplit import control
from resplit.child import Child
from resplit.cluster import LocalCluster
from resplit.defaults import CONNECT_TIMEOUT_S
from resplit.demo import shipped_store
from resplit.exchange import open_connection
from schemas import subjects
from schemas.control import DeployRequest
from schemas.deployment import Settings

AGENTS = 3
SETTINGS = Settings(context_tokens=256, max_sequences=16, max_queued=32, chunk_tokens=16)
FACTORS = (0.1, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
SECONDS = 20.0
ARRIVALS_MIN = 30
ALONE = 12
CLOSED_S = 15.0
REST_S = 3.0
BATCH_S = 30.0
ANSWER_S = 90.0
SERVES_S = 60.0
HOLDS = 0.8
"""Of the best goodput, which is to be left at five times the capacity."""
REFUSED_MS = 100.0
"""By then 99 in 100 refusals are to be heard."""


@dataclass(frozen=True)
class Kind:
    """A class of requests."""

    name: str
    share: float
    tokens: int
    priority: int
    slack: float | None
    """Its deadline, in times of what one takes alone; None: it has none."""

    def body(self, alone_s: float, draw: random.Random) -> dict[str, Any]:
        prompt = f"{draw.randrange(10**5)}+{draw.randrange(10**5)}="
        fields = {"prompt": prompt, "max_tokens": self.tokens, "ignore_eos": True, "priority": self.priority}
        return fields if self.slack is None else {**fields, "deadline_ms": round(1e3 * self.bound_s(alone_s))}

    def bound_s(self, alone_s: float) -> float:
        return BATCH_S if self.slack is None else self.slack * alone_s


KINDS = (
    Kind("interactive", 0.5, 24, 3, 6.0),
    Kind("standard", 0.3, 48, 0, 15.0),
    Kind("batch", 0.2, 96, -3, None),
)


@dataclass(frozen=True)
class Answer:
    """One request as who asked saw it."""

    kind: str
    late_s: float
    """From when it was to be sent until it was."""
    took_s: float
    code: str | None
    """Of the error in which it ended."""
    ttft_ms: float | None = None
    tpot_ms: float | None = None


# Who asks, in a process of its own.


async def offer(url: str, keys: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Ask as `plan` says; the answers, and what asking took."""
    connection = await open_connection(url, "resplit-bench", CONNECT_TIMEOUT_S, load_credentials(keys).nats_options)
    draw = random.Random(plan["seed"])
    process = psutil.Process()
    before, began = process.cpu_times(), time.monotonic()
    if plan["rate"] is None:
        answers = await _closed(connection, plan, draw)
    else:
        answers = await _open(connection, plan, draw)
    took_s, after = time.monotonic() - began, process.cpu_times()
    await connection.close()
    cores = (after.user + after.system - before.user - before.system) / took_s
    return {"answers": [asdict(one) for one in answers], "cores": cores, "took_s": took_s}


async def _open(connection: Nats, plan: dict[str, Any], draw: random.Random) -> list[Answer]:
    """Arrivals by Poisson, whatever becomes of those before."""
    asking, began, due = [], time.monotonic(), 0.0
    while (due := due + draw.expovariate(plan["rate"])) < plan["seconds"]:
        kind = _drawn(draw)
        body = kind.body(plan["alone_s"][kind.name], draw)
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        asking.append(asyncio.create_task(_ask(connection, kind, body, began + due)))
    return list(await asyncio.gather(*asking))


async def _closed(connection: Nats, plan: dict[str, Any], draw: random.Random) -> list[Answer]:
    """So many at a time, one after the other, without deadlines."""
    until, answers = time.monotonic() + plan["seconds"], list[Answer]()

    async def ask_on(kinds: Sequence[Kind]) -> None:
        while time.monotonic() < until:
            kind = _drawn(draw, kinds)
            body = {name: value for name, value in kind.body(1.0, draw).items() if name != "deadline_ms"}
            answers.append(await _ask(connection, kind, body, time.monotonic()))

    only = [kind for kind in KINDS if plan["only"] in (None, kind.name)]
    await asyncio.gather(*(ask_on(only) for _ in range(plan["at_once"])))
    return answers


def _drawn(draw: random.Random, kinds: Sequence[Kind] = KINDS) -> Kind:
    return draw.choices(kinds, [kind.share for kind in kinds])[0]


async def _ask(connection: Nats, kind: Kind, body: dict[str, Any], due: float) -> Answer:
    began = time.monotonic()
    try:
        message = await connection.request(subjects.infer(DEPLOYMENT), json.dumps(body).encode(), ANSWER_S)
        reply = json.loads(message.data)
    except (NatsError, TimeoutError) as error:
        reply = {"error": {"code": type(error).__name__}}
    took_s, late_s = time.monotonic() - began, began - due
    if "error" in reply:
        return Answer(kind.name, late_s, took_s, reply["error"]["code"])
    usage = reply["usage"]
    return Answer(kind.name, late_s, took_s, None, usage.get("ttft_ms"), usage.get("tpot_ms"))


# What is made of it.


@dataclass(frozen=True)
class Offered:
    """What became of one load."""

    answers: tuple[Answer, ...]
    cores: float
    """That who asked took."""
    took_s: float


async def measure(seconds: float, seed: int, folder: Path) -> tuple[list[Row], Row]:
    store = Path(shutil.copytree(shipped_store(), folder / "store"))
    async with LocalCluster(folder / "cluster", store, AGENTS, threads=1) as cluster:
        request = DeployRequest(name=DEPLOYMENT, model=DEPLOYMENT, settings=SETTINGS, stages=2)
        await control.deploy_and_wait(cluster.operator, request, SERVES_S)

        async def offered(**plan: Any) -> Offered:
            return await _offered(cluster, folder, {"rate": None, "only": None, "seed": seed, **plan})

        await offered(at_once=SETTINGS.max_sequences, seconds=5.0)  # what is measured first is measured warm
        alone_s = {}
        for kind in KINDS:
            found = await offered(at_once=1, seconds=3.0, only=kind.name)
            alone_s[kind.name] = statistics.median(one.took_s for one in found.answers if one.code is None)
        closed = await offered(at_once=SETTINGS.max_sequences, seconds=CLOSED_S)
        capacity = sum(one.code is None for one in closed.answers) / closed.took_s
        print(f"capacity {capacity:.1f} requests/s; alone {alone_s}", flush=True)
        rows = []
        for factor in FACTORS:
            lasts = max(seconds, ARRIVALS_MIN / (factor * capacity))
            found = await offered(rate=factor * capacity, seconds=lasts, alone_s=alone_s)
            told = _rows(factor, found, alone_s, lasts)
            print(told[0], flush=True)
            rows += told
            await asyncio.sleep(REST_S)
    return rows, {
        "capacity_per_s": round(capacity, 2),
        "alone_ms": {name: round(1e3 * value, 1) for name, value in alone_s.items()},
        "bounds_ms": {kind.name: round(1e3 * kind.bound_s(alone_s[kind.name]), 1) for kind in KINDS},
    }


async def _offered(cluster: LocalCluster, folder: Path, plan: dict[str, Any]) -> Offered:
    out = folder / "answers.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.overload", "--offer", cluster.url, str(cluster.client_keys)]
    child = Child("who asks", [*command, str(out), json.dumps(plan)], folder / "asks.log")
    await child.start()
    status = await child.ended()
    if not out.exists():
        raise child.died(status)
    found = json.loads(out.read_text())
    return Offered(tuple(Answer(**one) for one in found["answers"]), found["cores"], found["took_s"])


def _rows(factor: float, found: Offered, alone_s: dict[str, float], seconds: float) -> list[Row]:
    """All classes together, then each."""
    whole: Row = {
        "name": f"{factor:g}x",
        "factor": factor,
        **_figures(found.answers, alone_s, seconds),
        "late_p99_ms": round(1e3 * quantile([one.late_s for one in found.answers], 0.99), 1),
        "asking_cores": round(found.cores, 2),
    }
    rows = [whole]
    for kind in KINDS:
        mine = [one for one in found.answers if one.kind == kind.name]
        if mine:
            figures = _figures(mine, alone_s, seconds)
            rows.append({"name": f"{factor:g}x {kind.name}", "factor": factor, "class": kind.name, **figures})
    return rows


def _figures(answers: Sequence[Answer], alone_s: dict[str, float], seconds: float) -> Row:
    bounds = {kind.name: kind.bound_s(alone_s[kind.name]) for kind in KINDS}
    done = [one for one in answers if one.code is None]
    good = [one for one in done if one.took_s <= bounds[one.kind]]
    refused = [one.took_s for one in answers if one.code in ("overloaded", "deadline_unattainable")]
    ended = [one for one in answers if one.code == "deadline_exceeded"]
    row: Row = {
        "offered_per_s": round(len(answers) / seconds, 2),
        "goodput_per_s": round(len(good) / seconds, 2),
        "good_share": round(len(good) / len(answers), 3),
        "refused": len(refused),
        "too_late": len(ended) + len(done) - len(good),
        "failed": len(answers) - len(done) - len(refused) - len(ended),
        "codes": dict(Counter(one.code for one in answers if one.code is not None)),
    }
    for name in ("ttft_ms", "tpot_ms"):
        values = [value for one in done if (value := getattr(one, name)) is not None]
        row |= {f"{name}_p{100 * q:.0f}": round(quantile(values, q), 1) for q in (0.5, 0.95, 0.99) if values}
    return row | {f"refused_ms_p{100 * q:.0f}": round(1e3 * quantile(refused, q), 1) for q in (0.5, 0.99) if refused}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether goodput holds, classes are kept apart and refusals are quick, in sentences."""
    whole = {row["factor"]: row for row in rows if "class" not in row}
    best, most = max(row["goodput_per_s"] for row in whole.values()), whole[max(whole)]
    share = most["goodput_per_s"] / best
    slow = max((row["refused_ms_p99"] for row in whole.values() if "refused_ms_p99" in row), default=0.0)
    by_class = {row["class"]: row["good_share"] for row in rows if row["factor"] == 1.5 and "class" in row}
    first, last = by_class.get(KINDS[0].name, 0.0), by_class.get(KINDS[1].name, 0.0)
    if not any(row["refused"] + row["too_late"] for row in whole.values()):
        return ["nothing was refused and nothing late: this was no overload, the capacity was measured too low"]
    return [
        f"goodput at {max(whole):g} times the capacity is {share:.0%} of the best (>= {HOLDS:.0%}): "
        f"{_met(share >= HOLDS)}",
        f"at 1.5 times, {first:.0%} of the interactive and {last:.0%} of the standard requests are in time (the former "
        f"first): {_met(first >= last)}",
        f"99 in 100 refusals come within {slow:.0f} ms at the worst load (<= {REFUSED_MS:g}): "
        f"{_met(slow <= REFUSED_MS)}",
    ]


def _met(held: bool) -> str:
    return "met" if held else "**missed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each load ({SECONDS:g})")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, classes and prompts")
    parser.add_argument("--offer", nargs=4, metavar=("URL", "KEYS", "OUT", "PLAN"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.offer is not None:
        url, keys, out, plan = given.offer
        Path(out).write_text(json.dumps(asyncio.run(offer(url, Path(keys), json.loads(plan)))))
        return
    with tempfile.TemporaryDirectory(prefix="resplit-overload-") as scratch:
        rows, more = asyncio.run(measure(given.seconds, given.seed, Path(scratch)))
    said = verdicts(rows)
    report(
        "overload",
        f"0.1 to 5 times what a cluster can do ({more['capacity_per_s']:g} requests/s)",
        rows,
        **more,
        verdicts=said,
        seed=given.seed,
        load_average=os.getloadavg(),
    )
    print("\n".join(said))


if __name__ == "__main__":
    main()
