"""More models than memory, on real processes: `python -m benchmarks.residency [--quick]`.

Six decoders with weights of their own, deployed on demand over three agents that together have room for two; requests
come at random, by Zipf's law over an order of popularity that changes every minute. The same trace is run with
deployments kept by worth and loaded ahead of need, and with those used last kept (LRU). A *stall* is a request that
came to a cold deployment and waited until it was loaded.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.table import Row, report
from models.importer import import_model
from models.store import Store
from profiler.memory import memory_bytes
from resplit import Client, control
from resplit.cluster import LocalCluster
from resplit.replies import RequestError
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from schemas.deployment import Settings

MODELS, AGENTS = 6, 3
SETTINGS = Settings(context_tokens=256, max_sequences=8)
BARE_BYTES = 170_000_000
"""What an agent takes with nothing loaded, with some air."""
PER_S, ZIPF, DRIFT_S, LASTS_S = 0.5, 1.2, 60.0, 300.0
OUTPUT_TOKENS = 16
STALL_MS = 250.0
"""Nothing but its model being loaded has a request wait so long for its turn here: there are slots for all."""
HIDDEN, LAYERS = 448, 12


@dataclass(frozen=True)
class Asked:
    """One request of the trace."""

    at_s: float
    model: int


@dataclass(frozen=True)
class Met:
    """What became of it; None for a duration: it ended in an error."""

    waited_ms: float
    total_ms: float | None


def trace(lasts_s: float, seed: int) -> list[Asked]:
    """Poisson arrivals, by Zipf's law over an order that loses and gains two places every `DRIFT_S`."""
    draw = random.Random(seed)
    order, found, at_s, changes = list(range(MODELS)), list[Asked](), 0.0, 1
    weights = [(rank + 1) ** -ZIPF for rank in range(MODELS)]
    while (at_s := at_s + draw.expovariate(PER_S)) < lasts_s:
        while at_s >= changes * DRIFT_S:
            order.append(order.pop(0))
            order[0], order[1 + changes % (MODELS - 1)] = order[1 + changes % (MODELS - 1)], order[0]
            changes += 1
        found.append(Asked(at_s, draw.choices(order, weights)[0]))
    return found


def models(folder: Path) -> Store:
    """A store of that many decoders of random weights, made once."""
    from tests.model_zoo import decoder_folder  # noqa: PLC0415 - importing it takes torch's seconds

    store = Store(folder / "store")
    for number in range(MODELS):
        if name_of(number) not in store.names():
            # A folder each: what is random in it is drawn by its seed.
            source = decoder_folder(folder / f"m{number}", "llama", layers=LAYERS, hidden=HIDDEN, seed=number)
            import_model(str(source), store, name_of(number), "fp32", lambda *_: None)
    return store


def name_of(number: int) -> DeploymentName:
    return DeploymentName(f"m{number}")


async def run(store: Store, keep: Literal["worth", "recent"], asked: Sequence[Asked]) -> list[Met]:
    need = sum(memory_bytes(block, SETTINGS) for block in store.manifest("m0").blocks)
    memory = BARE_BYTES + round(MODELS / 3 * need / AGENTS)
    with tempfile.TemporaryDirectory() as folder:
        root = store.blobs_folder.parent
        async with (
            LocalCluster(Path(folder), root, AGENTS, threads=1, memory_bytes=memory, keep=keep) as cluster,
            Client(cluster.url, keys=cluster.client_keys, idle_timeout_s=600.0) as client,
        ):
            for number in range(MODELS):
                name = name_of(number)
                request = DeployRequest(name=name, model=name, settings=SETTINGS, on_demand=True)
                await control.deploy_and_wait(cluster.operator, request, 300.0)
            for number in range(MODELS):  # every disk has what it will need, and every kernel was probed
                await client.complete(name_of(number), "the quick", max_tokens=1)
            began = time.monotonic()
            return await asyncio.gather(*(_one(client, one, began) for one in asked))


async def _one(client: Client, one: Asked, began: float) -> Met:
    await asyncio.sleep(max(0.0, began + one.at_s - time.monotonic()))
    try:
        answer = await client.complete(name_of(one.model), "the quick", max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    except RequestError as error:
        print(f"m{one.model} at {one.at_s:.1f} s: {error}")
        return Met(0.0, None)
    return Met(answer.usage.queued_ms, answer.usage.total_ms)


def summed(keep: str, met: Sequence[Met]) -> Row:
    done = [one for one in met if one.total_ms is not None]
    totals = np.array([one.total_ms for one in done], float)
    stalls = sum(one.waited_ms > STALL_MS for one in done)
    return {
        "name": "by worth, ahead of need" if keep == "worth" else "used last (LRU)",
        "requests": len(met),
        "failed": len(met) - len(done),
        "hit rate": round(1.0 - stalls / max(1, len(done)), 3),
        "stalls per 1,000": round(1000.0 * stalls / max(1, len(done)), 1),
        "mean ms": round(float(totals.mean()), 1),
        "p50 ms": round(float(np.percentile(totals, 50)), 1),
        "p95 ms": round(float(np.percentile(totals, 95)), 1),
    }


async def measure(folder: Path, lasts_s: float, seeds: Sequence[int]) -> None:
    store = models(folder)
    met: dict[str, list[Met]] = {"worth": [], "recent": []}
    for turn, seed in enumerate(seeds):
        asked = trace(lasts_s, seed)
        both: tuple[Literal["worth", "recent"], ...] = ("worth", "recent") if turn % 2 == 0 else ("recent", "worth")
        for keep in both:
            found = await run(store, keep, asked)
            met[keep] += found
            print(seed, summed(keep, found), flush=True)
    title = f"{MODELS} models, {AGENTS} agents with room for two, popularity that changes every {DRIFT_S:g} s"
    report("residency", title, [summed(keep, found) for keep, found in met.items()], load_average=os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/residency").expanduser())
    parser.add_argument("--seeds", type=int, default=3, help="traces, each run both ways")
    parser.add_argument("--quick", action="store_true", help="one trace of a minute")
    arguments = parser.parse_args()
    lasts_s, seeds = (60.0, 1) if arguments.quick else (LASTS_S, arguments.seeds)
    asyncio.run(measure(arguments.folder, lasts_s, range(seeds)))


if __name__ == "__main__":
    main()
