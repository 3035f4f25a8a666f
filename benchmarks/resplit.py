"""A model is cut anew while it streams: `python -m benchmarks.resplit [--quick] [--folder DIR]`.

Greedy sequences stream over agents on shared cores. First they run undisturbed; then the same requests run again while
the deployment is placed in another way, and back, over and over: the first visit of a placement is cold (files are
fetched, sessions opened and timed), later ones find the files on disk. A row has one change: how long it took, the
longest wait for a token on any stream from the request until the old plan was gone, and what was moved.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.table import Row, report
from benchmarks.watch import Memory, Stream, Trail, gaps, watching
from models.store import Store
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.manifest import Manifest

CONTEXT_TOKENS, SLOTS_PER_SEQUENCE = 512, 4
"""A quarter of the slots hold the whole context: enough for all sequences to run at once."""
PROMPT_TOKENS = 32
TIMEOUT_S = 120.0
REST_S = 1.5
"""Between two changes."""
DEPLOYMENT = DeploymentName(NAME)
N0, N1, N2 = NodeId("n0"), NodeId("n1"), NodeId("n2")
GAP_FLOOR_S, GAP_FACTOR = 0.08, 3.0


Placement = tuple[Stage, ...]


def placements(blocks: int) -> dict[str, Placement]:
    """Where to go, by what the way there from the first one is called."""
    half, last = blocks // 2, blocks - 1

    def two(cut: int, first: NodeId = N0, second: NodeId = N1) -> Placement:
        return Stage(node=first, first=0, last=cut - 1), Stage(node=second, first=cut, last=last)

    third = blocks // 3
    three = (
        Stage(node=N0, first=0, last=third - 1),
        Stage(node=N2, first=third, last=half - 1),
        Stage(node=N1, first=half, last=last),
    )
    cuts = {f"cut moved by {n}": two(half + n) for n in (1, 4, 8) if half + n < blocks}
    return {"home": two(half), **cuts, "2 to 3 stages": three, "nodes swapped": two(half, N1, N0)}


def moved_blocks(old: Placement, new: Placement) -> list[int]:
    """Blocks that change their node."""
    before = {block: stage.node for stage in old for block in stage.blocks}
    return [block for stage in new for block in stage.blocks if before[block] != stage.node]


@dataclass
class Bench:
    """A deployment under load, and what watches it."""

    cluster: LocalCluster
    manifest: Manifest
    client: Client
    trail: Trail
    memory: Memory
    at: Placement

    async def undisturbed(self, streams: list[Stream]) -> None:
        """Run streams to their ends."""
        await asyncio.gather(*(stream.run(self.client, NAME) for stream in streams))
        for stream in streams:
            if stream.error is not None:
                raise RuntimeError(f"{stream.request_id} ended undisturbed: {stream.error}")

    async def change(self, name: str, to: Placement, streams: list[Stream]) -> Row | None:
        """Go to another placement while `streams` run; None if they ended before that was done."""
        await asyncio.sleep(REST_S)
        old, before = self.at, self.memory.now()
        began = time.time()
        # Others may use the machine as well: what is usual is what was so just before.
        rest = [wait for _, wait in gaps(streams, began - REST_S, began)]
        await place_and_wait(self.cluster.operator, DEPLOYMENT, to, TIMEOUT_S)
        over = time.time()
        self.at = to
        await asyncio.sleep(REST_S)  # the last gaps, events and samples
        live = [stream for stream in streams if stream.times and stream.times[-1] > over]
        if len(live) < len(streams) or not rest:
            return None
        tpot_s = statistics.median(rest)
        committed = self.trail.since(began, AuditKind.PLAN_COMMITTED)
        retired = [e for e in self.trail.since(began, AuditKind.PLAN_RETIRED) if e.at.timestamp() <= over]
        moves = self.trail.since(began, AuditKind.SEQUENCE_MOVED)
        end = max([e.at.timestamp() for e in retired], default=over)
        waits = gaps(live, began, end)
        committed_at = committed[0].at.timestamp() if committed else began
        crossed_at = max((e.at.timestamp() for e in moves), default=committed_at)
        blocks = moved_blocks(old, to)
        used = sum(
            next((s.written(e.at.timestamp()) for s in streams if s.request_id == e.request), 0)
            * sum(self.manifest.blocks[b].kv_bytes_per_token for b in blocks)
            for e in moves
        )
        moved = sum(int(e.fields["moved_bytes"] or 0) for e in moves)
        held = [float(e.fields["held_ms"] or 0) for e in moves]
        return {
            "name": name,
            "sequences": len(live),
            "blocks_moved": len(blocks),
            "crossed": len(moves),
            "to_commit_s": round(committed_at - began, 3),
            "to_crossed_s": round(crossed_at - began, 3),
            "tpot_ms": round(1e3 * tpot_s, 1),
            "gap_before_ms": round(1e3 * max(rest), 1),
            "gap_loading_ms": _worst(waits, began, committed_at),
            "gap_crossing_ms": _worst(waits, committed_at, crossed_at + tpot_s),
            "gap_after_ms": _worst(waits, crossed_at + tpot_s, end),
            "gap_worst_ms": _worst(waits, began, end),
            "gap_target_ms": round(1e3 * max(GAP_FLOOR_S, GAP_FACTOR * tpot_s), 1),
            "held_ms_median": round(statistics.median(held), 2) if held else None,
            "held_ms_worst": max(held, default=None),
            "moved_mb": round(moved / 1e6, 2),
            "moved_over_used": round(moved / used, 3) if used else None,
            **self._memory_grown(old, to, before, began, end),
        }

    def _memory_grown(self, old: Placement, new: Placement, before: dict[str, int], began: float, end: float) -> Row:
        """Of the agent that grew most: the weights that arrived on it, and its private memory over before, in MB."""
        now = self.memory.now()
        grown = {node: self.memory.peak(node, began, end) - before[node] for node in self.cluster.agents}
        node = max(grown, key=lambda node: grown[node])
        arriving = _blocks_on(new, node) - _blocks_on(old, node)
        return {
            "arriving_mb": round(sum(self.manifest.blocks[b].weight_bytes for b in arriving) / 1e6, 1),
            "memory_peak_mb": round(grown[node] / 1e6, 1),
            "memory_settled_mb": round((now[node] - before[node]) / 1e6, 1),
        }


def _blocks_on(placement: Placement, node: str) -> set[int]:
    return {block for stage in placement if stage.node == node for block in stage.blocks}


def _worst(waits: list[tuple[float, float]], begin: float, end: float) -> float | None:
    """The longest wait that overlaps a time, in ms."""
    return round(1e3 * max((w for at, w in waits if at >= begin and at - w <= end), default=0.0), 1) or None


async def measure_load(
    folder: Path,
    store: Store,
    sequences: int,
    tokens: int,
    rounds: int,
    numbers: "itertools.count[int]",
    rows: list[Row],
) -> None:
    """All changes with so many sequences, on a cluster of its own, so that first visits are cold; adds to `rows`."""
    manifest = store.manifest(store.resolve(NAME))
    goals = placements(len(manifest.blocks))
    home = goals.pop("home")
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 32000) for _ in range(PROMPT_TOKENS)] for _ in range(sequences)]

    def fresh(count: int = tokens) -> list[Stream]:
        return [Stream(prompt, count, f"bench-{next(numbers)}") for prompt in prompts]

    cores = len(os.sched_getaffinity(0))
    async with LocalCluster(folder, store.blobs_folder.parent, agents=3, threads=cores) as cluster:
        settings = Settings(context_tokens=CONTEXT_TOKENS, max_sequences=SLOTS_PER_SEQUENCE * sequences)
        request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=home, settings=settings)
        await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
        async with watching(cluster) as (client, trail, memory):
            bench = Bench(cluster, manifest, client, trail, memory, home)
            await bench.undisturbed(fresh(16))  # everybody warms up
            calm = fresh()
            await bench.undisturbed(calm)
            calm_waits = sorted(
                wait for _, wait in gaps(calm, max(s.times[0] for s in calm), min(s.times[-1] for s in calm))
            )
            tpot_s = statistics.median(calm_waits)
            rows.append(
                {
                    "name": "undisturbed",
                    "sequences": sequences,
                    "tpot_ms": round(1e3 * tpot_s, 1),
                    "gap_worst_ms": round(1e3 * calm_waits[-1], 1),
                }
            )
            steps = [
                (f"{name}{there}", to) for name, goal in goals.items() for there, to in (("", goal), (", back", home))
            ]
            todo = [("warm" if to is home else "cold", name, to) for name, to in steps]
            todo += [("warm", *step) for _ in range(rounds) for step in steps]
            while todo:
                streams = fresh()
                running = asyncio.gather(*(stream.run(client, NAME) for stream in streams))
                await asyncio.gather(*(stream.reached(1) for stream in streams))
                # A change that would end behind the streams is left to the next ones.
                while todo and min(len(s.times) for s in streams) < 0.5 * tokens:
                    kind, name, to = todo.pop(0)
                    row = await bench.change(name, to, streams)
                    if row is not None:
                        rows.append({"kind": kind, **row})
                        print(rows[-1], flush=True)
                await running
                for row in (row for row in rows if "kind" in row):
                    row.setdefault("errors", [stream.error for stream in streams if stream.error is not None])
                    row.setdefault("failed", sum(stream.error is not None for stream in streams))
                    row.setdefault("identical", all(s.ids == c.ids for s, c in zip(streams, calm, strict=True)))


async def measure(folder: Path, quick: bool) -> None:
    store, _, _ = bench_model(folder)
    numbers = itertools.count()
    rows: list[Row] = []
    loads = ((8, 160),) if quick else ((8, 400), (16, 400))
    try:
        for sequences, tokens in loads:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "c"
                await measure_load(folder, store, sequences, tokens, 0 if quick else 2, numbers, rows)
    finally:  # also of a run that was interrupted
        title = f"re-splits under load, {PARAMETERS // 10**6} M parameters, int4"
        report("resplit", title, rows, load_average=os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="8 sequences, and every way once")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, arguments.quick))


if __name__ == "__main__":
    main()
