"""What sealing costs, the same model sealed and in the open by turns: `python -m benchmarks.sealed [--quick]`.

Blocks: from files on the disk, read before and verified, to a session of ONNX Runtime, in one process. Re-splits: two
agents of a cluster that nobody else uses, from the request for another placement until that plan is in force; `cold`
fetches the files from the registry, `warm` finds them on the disk. Both kinds run next to each other in every round,
and which is first changes; the ratio is the median over rounds of sealed over open, with its 95 % interval where there
are six rounds or more, else with the least and the most.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import onnxruntime as ort

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.paired import median_interval
from benchmarks.resplit import CONTEXT_TOKENS, DEPLOYMENT, TIMEOUT_S, placements
from benchmarks.table import Row, report
from benchmarks.watch import watching
from models.keyring import stored_keys
from models.opening import opened
from models.sealer import seal_model
from models.session import open_session
from models.store import Store
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait
from schemas.audit import AuditKind
from schemas.control import DeployRequest
from schemas.deployment import Chain, Settings

MOVED = 8
"""Layers that change their node in a re-split."""
WARM_VISITS = 4
"""There and back, of one cluster."""
SETTLE_S = 1.0

Times = dict[str, list[float]]
"""By what was done: seconds, one for each round."""


def measure_blocks(stores: dict[str, Store], rounds: int, threads: int) -> list[Row]:
    """Loading a layer, the embedding and the head."""
    found: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    manifests = {kind: store.manifest(NAME) for kind, store in stores.items()}
    last = len(next(iter(manifests.values())).blocks) - 1
    for number in range(rounds + 1):
        for kind in _by_turns(stores, number):
            store, manifest = stores[kind], manifests[kind]
            for name, index in (("embedding", 0), ("a layer", last // 2), ("head", last)):
                began = time.perf_counter()
                keys = stored_keys(store, manifest.digest)
                with opened(store, manifest, [manifest.blocks[index]], keys) as ([graph], folder):
                    ready = time.perf_counter()
                    session: ort.InferenceSession = open_session(graph, folder, "cpu", threads)
                loaded = time.perf_counter()
                del session
                if number:  # the first round reads files from the disk and verifies them
                    found[f"{name} opened"][kind].append(ready - began)
                    found[f"{name} opened and loaded"][kind].append(loaded - began)
    sizes = {
        name: manifests["open"].blocks[i].weight_bytes
        for name, i in (("embedding", 0), ("a layer", last // 2), ("head", last))
    }
    return [
        _row(name, times, size_mb=next(s for n, s in sizes.items() if name.startswith(n)) / 1e6)
        for name, times in found.items()
    ]


async def measure_resplits(stores: dict[str, Store], rounds: int, threads: int) -> list[Row]:
    """Eight layers from one node to the other and back."""
    found: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for kind in _by_turns(stores, number):
            for name, seconds in await _resplits(stores[kind], threads):
                found[name][kind].append(seconds)
                print(kind, name, round(seconds, 3), flush=True)
    layers = stores["open"].manifest(NAME).blocks[1:-1]
    moved_mb = MOVED * statistics.mean(block.weight_bytes for block in layers) / 1e6
    return [_row(name, times, size_mb=moved_mb) for name, times in found.items()]


async def _resplits(store: Store, threads: int) -> list[tuple[str, float]]:
    """What each re-split of a fresh cluster took."""
    goals = placements(len(store.manifest(NAME).blocks))
    home, away = goals["home"], goals[f"cut moved by {MOVED}"]
    with tempfile.TemporaryDirectory() as temporary:
        async with LocalCluster(Path(temporary) / "c", store.root, agents=2, threads=threads) as cluster:
            settings = Settings(context_tokens=CONTEXT_TOKENS, max_sequences=4)
            request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=home, settings=settings)
            await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
            async with watching(cluster) as (_, trail, _):

                async def until_committed(to: Chain) -> float:
                    await asyncio.sleep(SETTLE_S)
                    began = time.time()
                    await place_and_wait(cluster.operator, DEPLOYMENT, to, TIMEOUT_S)
                    await asyncio.sleep(SETTLE_S)  # the last events
                    [committed] = trail.since(began, AuditKind.PLAN_COMMITTED)
                    return committed.at.timestamp() - began

                times = [(f"{MOVED} layers moved, cold", await until_committed(away))]
                await until_committed(home)
                for _ in range(WARM_VISITS):
                    times.append((f"{MOVED} layers moved, warm", await until_committed(away)))
                    times.append((f"{MOVED} layers moved back, warm", await until_committed(home)))
    return times


def _by_turns(kinds: Iterable[str], number: int) -> list[str]:
    return list(kinds)[:: 1 if number % 2 else -1]


def _row(name: str, times: Times, size_mb: float) -> Row:
    ratios = [sealed / plain for plain, sealed in zip(times["open"], times["sealed"], strict=True)]
    low, high = median_interval(ratios)
    return {
        "name": name,
        "size_mb": round(size_mb, 1),
        "rounds": len(ratios),
        "open_ms": round(1e3 * statistics.median(times["open"]), 1),
        "sealed_ms": round(1e3 * statistics.median(times["sealed"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(low, 2),
        "ratio_high": round(high, 2),
    }


def sealing(source: Store, target: Store) -> Row:
    """How long it takes to seal the whole model, once."""
    began = time.perf_counter()
    seal_model(source, NAME, target)
    seconds = time.perf_counter() - began
    size_mb = source.manifest(NAME).stored_bytes / 1e6
    return {
        "name": "sealing the model",
        "size_mb": round(size_mb, 1),
        "rounds": 1,
        "sealed_ms": round(1e3 * seconds, 1),
    }


def measure(folder: Path, quick: bool) -> None:
    plain, _, _ = bench_model(folder)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        sealed = Store(Path(temporary) / "sealed")
        rows = [sealing(plain, sealed)]
        stores = {"open": plain, "sealed": sealed}
        rows += measure_blocks(stores, 5 if quick else 15, threads)
        rows += asyncio.run(measure_resplits(stores, 1 if quick else 3, threads))
    title = f"sealed against open, {PARAMETERS // 10**6} M parameters, int4"
    report("sealed", title, rows, load_average=os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    measure(arguments.folder, arguments.quick)


if __name__ == "__main__":
    main()
