"""Handing a sequence's caches over against computing them anew, both measured.

    python -m benchmarks.handover [--quick] [--folder DIR]

One sequence streams over two of three agents. At certain lengths the second half of the model moves to the third one,
with the files on its disk, and the sequence's caches go with it: measured are how long the sequence stood still
(`held`), and how long it took from the plan's commit until it ran over the new plan (`crossing`; it streams meanwhile).
Then the agent that now has the second half is killed, and once that is known the same blocks move back: the sequence is
computed anew, exactly, prompt and all. `anew` is from that plan's commit to the next token, so that neither noticing
the loss nor loading is in it. The crossover is told as a rate: over a link that is slower than what moves in the time
that computing anew takes, computing anew is sooner done.
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
from benchmarks.resplit import DEPLOYMENT, N0, N1, N2, TIMEOUT_S, Placement
from benchmarks.table import Row, report
from benchmarks.watch import Stream, Trail, watching
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.manifest import Manifest

PROMPTS = (64, 256, 1024)
GENERATED = (16, 64, 256)
CONTEXT_TOKENS = 2048
KNOWN_S = 1.5
"""From a kill until the ingress has given up what ran over it: a connection that closes is noticed in a fraction."""
AFTER_TOKENS = 4
"""The stream goes on a little between two moves."""
SETTINGS = Settings(context_tokens=CONTEXT_TOKENS, max_sequences=4)


async def measure(folder: Path, prompts: tuple[int, ...], generated: tuple[int, ...], rounds: int) -> None:
    store, _, _ = bench_model(folder)
    rng = random.Random(0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        threads = len(os.sched_getaffinity(0))
        async with LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=3, threads=threads) as cluster:
            for number, (prompt_tokens, _) in enumerate(itertools.product(prompts, range(rounds))):
                async with watching(cluster) as (client, trail, _):
                    trial = Trial(cluster, store.manifest(store.resolve(NAME)), trail)
                    await trial.begin()
                    prompt = [rng.randrange(2, 32000) for _ in range(prompt_tokens)]
                    stream = Stream(prompt, generated[-1] + 400, f"bench-{number}")
                    running = asyncio.create_task(stream.run(client, NAME))
                    for tokens in generated:
                        await stream.reached(tokens)
                        rows.append(await trial.both_ways(stream, tokens))
                        print(rows[-1], flush=True)
                    await client.cancel(stream.request_id)
                    await running
    title = f"one sequence handed over and computed anew, {PARAMETERS // 10**6} M parameters, int4"
    report("handover", title, summary(rows), rounds=rounds, raw=rows, load_average=os.getloadavg())


@dataclass
class Trial:
    """A deployment whose second half goes there and back."""

    cluster: LocalCluster
    manifest: Manifest
    trail: Trail

    async def begin(self) -> None:
        """Over the first two agents, and the files of the second half on the third one's disk as well."""
        for node in (N2, N1):
            request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=self.placement(node), settings=SETTINGS)
            await deploy_and_wait(self.cluster.operator, request, TIMEOUT_S)

    def placement(self, second: NodeId) -> Placement:
        blocks = len(self.manifest.blocks)
        half = blocks // 2
        return Stage(node=N0, first=0, last=half - 1), Stage(node=second, first=half, last=blocks - 1)

    async def both_ways(self, stream: Stream, generated: int) -> Row:
        """There by hand-over, and back by exact recovery."""
        row: Row = {"prompt": len(stream.prompt), "generated": generated}
        row |= await self._handed_over(stream)
        await stream.reached(len(stream.ids) + AFTER_TOKENS)
        row |= await self._computed_anew(stream)
        await self.cluster.start(N2)
        await stream.reached(len(stream.ids) + AFTER_TOKENS)
        return row

    async def _handed_over(self, stream: Stream) -> Row:
        asked = time.time()
        await place_and_wait(self.cluster.operator, DEPLOYMENT, self.placement(N2), TIMEOUT_S)
        moved = await self.trail.wait(asked, AuditKind.SEQUENCE_MOVED, stream.request_id)
        arrived = moved.at.timestamp()
        blocks = self.placement(N2)[1].blocks
        used = stream.written(arrived) * sum(self.manifest.blocks[b].kv_bytes_per_token for b in blocks)
        moved_bytes = int(moved.fields["moved_bytes"] or 0)
        return {
            "tokens_out": sum(t <= arrived for t in stream.times),
            "moved_mb": round(moved_bytes / 1e6, 2),
            "moved_over_used": round(moved_bytes / used, 3),
            "crossing_s": round(arrived - self._committed(asked), 3),
            "held_ms": float(moved.fields["held_ms"] or 0),
        }

    async def _computed_anew(self, stream: Stream) -> Row:
        killed = time.time()
        await self.cluster.kill(N2)
        await asyncio.sleep(KNOWN_S)
        known = len(stream.ids)
        await place_and_wait(self.cluster.operator, DEPLOYMENT, self.placement(N1), TIMEOUT_S)
        await stream.reached(known + 1)
        return {
            "anew_tokens_out": known,
            "anew_s": round(stream.times[known] - self._committed(killed), 3),
            "anew_gap_s": round(stream.times[known] - stream.times[known - 1], 3),
        }

    def _committed(self, since: float) -> float:
        """When the last plan since then was committed."""
        return self.trail.since(since, AuditKind.PLAN_COMMITTED)[-1].at.timestamp()


def summary(rows: list[Row]) -> list[Row]:
    """Medians over the rounds, and below which rate computing anew is sooner done."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["generated"]), []).append(row)
    summed = []
    for group in found.values():
        medians = {key: statistics.median(row[key] for row in group) for key in rows[0]}
        ratio = medians["anew_s"] / medians["crossing_s"]
        rate = 8 * medians["moved_mb"] / medians["anew_s"]
        summed.append({**medians, "anew_over_crossing": round(ratio, 1), "crossover_mbit_per_s": round(rate, 2)})
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one stream of each of the shorter lengths")
    arguments = parser.parse_args()
    prompts, generated, rounds = (PROMPTS[:2], GENERATED[:2], 1) if arguments.quick else (PROMPTS, GENERATED, 3)
    asyncio.run(measure(arguments.folder, prompts, generated, rounds))


if __name__ == "__main__":
    main()
