"""Handing a sequence's caches over against computing them anew.

    python -m benchmarks.handover [--quick] [--folder DIR]

One sequence streams over two agents. At certain lengths the deployment is placed in another way and back, with the
files on disk, so that blocks change their node and the sequence's caches go with them. Measured: how long the sequence
stood still (`held`), and how long it took from the plan's commit until it ran over the new plan (`crossing`; it streams
meanwhile). Recomputation is *computed* from what the same stream measured: the time to its first token, which is the
prefill in its original chunks, and the median wait for a token for each token that would be replayed.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.resplit import DEPLOYMENT, TIMEOUT_S, Placement, moved_blocks, placements
from benchmarks.table import Row, report
from benchmarks.watch import Stream, Trail, gaps, watching
from models.store import Store
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait
from schemas.audit import AuditKind
from schemas.control import DeployRequest
from schemas.deployment import Settings

PROMPTS = (64, 256, 1024)
GENERATED = (16, 64, 256)
AWAY = ("cut moved by 8", "nodes swapped")
CONTEXT_TOKENS = 2048
AFTER_TOKENS = 4
"""The stream goes on a little after its last move."""


async def measure(folder: Path, rounds: int) -> None:
    store, _, _ = bench_model(folder)
    cores = len(os.sched_getaffinity(0))
    goals = placements(len(store.manifest(store.resolve(NAME)).blocks))
    rng = random.Random(0)
    numbers = itertools.count()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        async with (
            LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=2, threads=cores) as cluster,
            watching(cluster) as (client, trail, _),
        ):
            settings = Settings(context_tokens=CONTEXT_TOKENS, max_sequences=4)
            request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=goals["home"], settings=settings)
            await deploy_and_wait(cluster.url, request, TIMEOUT_S)
            for away in AWAY:
                for placement in (goals[away], goals["home"]):  # the files are fetched before anything is timed
                    await place_and_wait(cluster.url, DEPLOYMENT, placement, TIMEOUT_S)
                for prompt_tokens, _ in itertools.product(PROMPTS, range(rounds)):
                    prompt = [rng.randrange(2, 32000) for _ in range(prompt_tokens)]
                    stream = Stream(prompt, GENERATED[-1] + 400, f"bench-{next(numbers)}")
                    running = asyncio.create_task(stream.run(client, NAME))
                    rows += await moves(cluster, store, trail, stream, away, (goals["home"], goals[away]))
                    await client.cancel(stream.request_id)
                    await running
                    await place_and_wait(cluster.url, DEPLOYMENT, goals["home"], TIMEOUT_S)
    title = f"one sequence handed over or computed anew, {PARAMETERS // 10**6} M parameters, int4"
    report("handover", title, summary(rows), rounds=rounds, raw=rows, load_average=os.getloadavg())


async def moves(
    cluster: LocalCluster, store: Store, trail: Trail, stream: Stream, name: str, between: tuple[Placement, Placement]
) -> list[Row]:
    """Move a stream at each of `GENERATED`, there and back."""
    manifest = store.manifest(store.resolve(NAME))
    started = time.time()
    rows: list[Row] = []
    here, there = between
    undisturbed: list[float] = []
    rested = 0.0
    for generated in GENERATED:
        await stream.reached(generated)
        asked = time.time()
        undisturbed += [wait for _, wait in gaps([stream], max(rested, stream.times[0]), asked)]
        await place_and_wait(cluster.url, DEPLOYMENT, there, TIMEOUT_S)
        here, there = there, here
        moved = await trail.wait(asked, AuditKind.SEQUENCE_MOVED, stream.request_id)
        rested = time.time()
        arrived = moved.at.timestamp()
        committed = trail.since(asked, AuditKind.PLAN_COMMITTED)[0].at.timestamp()
        tokens = sum(t <= arrived for t in stream.times)
        blocks = moved_blocks(there, here)
        used = stream.written(arrived) * sum(manifest.blocks[b].kv_bytes_per_token for b in blocks)
        moved_bytes = int(moved.fields["moved_bytes"] or 0)
        ttft_s, tpot_s = stream.times[0] - started, statistics.median(undisturbed)
        rows.append(
            {
                "name": name,
                "prompt": len(stream.prompt),
                "generated": generated,
                "tokens_out": tokens,
                "moved_mb": round(moved_bytes / 1e6, 2),
                "moved_over_used": round(moved_bytes / used, 3),
                "crossing_s": round(arrived - committed, 3),
                "held_ms": float(moved.fields["held_ms"] or 0),
                "ttft_s": round(ttft_s, 3),
                "tpot_ms": round(1e3 * tpot_s, 1),
                "recompute_s": round(ttft_s + (tokens - 1) * tpot_s, 3),
            }
        )
        print(rows[-1], flush=True)
    await stream.reached(rows[-1]["tokens_out"] + AFTER_TOKENS)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Medians over the rounds."""
    found: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["name"], row["prompt"], row["generated"]), []).append(row)
    summed = []
    for (name, prompt, generated), group in found.items():
        medians = {key: statistics.median(row[key] for row in group) for key in list(rows[0])[3:]}
        over = round(medians["recompute_s"] / medians["crossing_s"], 1)
        held = round(1e3 * medians["recompute_s"] / medians["held_ms"], 1)
        names = {"name": name, "prompt": prompt, "generated": generated}
        summed.append({**names, **medians, "recompute_over_crossing": over, "recompute_over_held": held})
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one stream of each length instead of three")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, 1 if arguments.quick else 3))


if __name__ == "__main__":
    main()
