"""One base and many adapters, against a model for each: `python -m benchmarks.lora`.

A decode step of a random decoder, with room for an adapter and with one, side by side in one process; and what a second
deployment takes of an agent's memory, and how long it takes until it serves, where it is another variant of the base
that is loaded and where it is a model of its own of the same size.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.residency import HIDDEN, LAYERS, SETTINGS, models
from benchmarks.table import Row, report
from models.lora import import_variant
from models.reference import Reference
from models.store import Store
from resplit import control
from resplit.cluster import LocalCluster
from schemas.base import DeploymentName
from schemas.control import DeployRequest

ROUNDS, TOKENS = 9, 48
BASE, OWN = "m0", "m1"
SHAPES = {"q_proj": 1.0, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 1.0}


def variants(folder: Path) -> Store:
    """A store with a base, the base with room for adapters, two variants over the attention's projections, and a model
    of its own."""
    from tests.lora_zoo import adapter_folder  # noqa: PLC0415 - the tests' adapters will do here

    store = models(folder)
    sizes = {name: (HIDDEN, round(HIDDEN * share)) for name, share in SHAPES.items()}
    import_variant(BASE, None, store, "room")
    for seed, name in enumerate(("tutor", "poet")):
        adapter = adapter_folder(folder, name, targets=sizes, layers=range(LAYERS), seed=seed, sizes=sizes)
        import_variant(BASE, str(adapter), store, name)
    return store


def steps(store: Store) -> list[Row]:
    """Milliseconds of a decode step, in turns."""
    names = {"the base": BASE, "room for an adapter": "room", "an adapter of rank 4": "tutor"}
    uncut = {name: Reference(store, model) for name, model in names.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        for name, reference in uncut.items():
            began = time.perf_counter()
            reference.generate([7, 11, 13], TOKENS, stop_at_eos=False)
            if turn:  # the first warms
                found[name].append(1e3 * (time.perf_counter() - began) / TOKENS)
    base = statistics.median(found["the base"])
    rows: list[Row] = []
    for name, one in found.items():
        step_ms = statistics.median(one)
        rows.append({"name": name, "step ms": round(step_ms, 3), "of the base's": round(step_ms / base, 3)})
    return rows


async def second(store: Store, first: str, other: str) -> tuple[float, float]:
    """Megabytes that `other` takes beside `first` on one agent, and seconds until it serves."""
    with tempfile.TemporaryDirectory() as folder:
        async with LocalCluster(Path(folder), store.root, 1, threads=1) as cluster:

            async def free() -> int:
                await asyncio.sleep(2.5)  # a heartbeat after all is done
                status = await control.status(cluster.operator)
                return status.nodes[0].capacity.memory_free_bytes

            await _deploy(cluster, first)
            before = await free()
            took_s = await _deploy(cluster, other)
            return (before - await free()) / 1e6, took_s


async def _deploy(cluster: LocalCluster, name: str) -> float:
    began = time.monotonic()
    request = DeployRequest(name=DeploymentName(name), model=name, settings=SETTINGS)
    await control.deploy_and_wait(cluster.operator, request, 300.0)
    return time.monotonic() - began


async def seconds(store: Store, runs: int) -> list[Row]:
    cases = {"another variant": ("tutor", "poet"), "a model of its own": (BASE, OWN)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, pair in cases.items():
            found[name].append(await second(store, *pair))
            print(name, found[name][-1], flush=True)
    return [
        {
            "name": name,
            "memory MB": round(statistics.median(one[0] for one in each), 1),
            "serves after s": round(statistics.median(one[1] for one in each), 2),
        }
        for name, each in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/residency").expanduser())
    parser.add_argument("--runs", type=int, default=3, help="clusters for each case")
    arguments = parser.parse_args()
    store = variants(arguments.folder)
    rows = [*steps(store), *asyncio.run(seconds(store, arguments.runs))]
    title = f"A decoder of {LAYERS} layers of width {HIDDEN}, one thread; a second deployment on one agent"
    report("lora", title, rows, load_average=os.getloadavg())


if __name__ == "__main__":
    main()
