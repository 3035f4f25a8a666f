"""A conversation grows: how long its next answer takes to begin, against the length of its history.

    python -m benchmarks.chat [--quick] [--folder DIR]

One conversation over two agents; every turn adds the last answer and a question to the prompt, one chunk together.
While the route keeps the caches of the turn before, only that chunk is prefilled. The same turns are asked again after
the deployment was cut elsewhere, so that nothing of them is kept: that is what a turn costs after a restart, a re-split
or on another route. The answers have to be the same.
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
from benchmarks.resplit import DEPLOYMENT, TIMEOUT_S, placements
from benchmarks.table import Row, report
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait
from schemas.control import DeployRequest
from schemas.deployment import Settings

CHUNK_TOKENS = 64
ANSWER_TOKENS = 16
TURNS = 16
ANEW = (2, 4, 8, 16)
"""Turns that are asked again with nothing kept."""
SETTINGS = Settings(chunk_tokens=CHUNK_TOKENS, context_tokens=2048, max_sequences=4)


@dataclass(frozen=True)
class Turn:
    """One turn: what was asked, what came, and after how long it began."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ttft_s: float
    cached_tokens: int


async def measure(folder: Path, rounds: int) -> None:
    store, _, _ = bench_model(folder)
    cores = len(os.sched_getaffinity(0))
    goals = placements(len(store.manifest(store.resolve(NAME)).blocks))
    places = itertools.cycle((goals["cut moved by 1"], goals["home"]))
    rng = random.Random(0)
    kept: list[list[Turn]] = []
    anew: list[dict[int, Turn]] = []
    with tempfile.TemporaryDirectory() as temporary:
        async with (
            LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=2, threads=cores) as cluster,
            Client(cluster.url, keys=cluster.client_keys) as client,
        ):
            request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=goals["home"], settings=SETTINGS)
            await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
            await conversation(client, random.Random(1), 2)  # everybody warms up
            for _ in range(rounds):
                kept.append(await conversation(client, rng, TURNS))
                anew.append({})
                for turn in ANEW:
                    await place_and_wait(cluster.operator, DEPLOYMENT, next(places), TIMEOUT_S)
                    anew[-1][turn] = await ask(client, kept[-1][turn - 1].prompt)
    title = (
        f"the next turn of a conversation, {PARAMETERS // 10**6} M parameters, int4, chunks of {CHUNK_TOKENS} tokens"
    )
    report("chat", title, summary(kept, anew), rounds=rounds, load_average=os.getloadavg())


async def conversation(client: Client, rng: random.Random, turns: int) -> list[Turn]:
    """So many turns, one after the other, each a chunk longer than the one before."""
    history: tuple[int, ...] = ()
    said: list[Turn] = []
    while len(said) < turns:
        question = CHUNK_TOKENS * (len(said) + 1) - len(history)
        turn = await ask(client, (*history, *(rng.randrange(2, 32000) for _ in range(question))))
        said.append(turn)
        history = turn.prompt + turn.answer
    return said


async def ask(client: Client, prompt: tuple[int, ...]) -> Turn:
    """One turn, read to its end."""
    began = time.monotonic()
    answer: list[int] = []
    ttft_s, cached = 0.0, 0
    async for token in client.stream(NAME, token_ids=prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True):
        ttft_s = ttft_s or time.monotonic() - began
        answer.append(token.token_id)
        cached = token.usage.cached_tokens if token.usage is not None else cached
    return Turn(prompt, tuple(answer), ttft_s, cached)


def summary(kept: list[list[Turn]], anew: list[dict[int, Turn]]) -> list[Row]:
    """Medians over the rounds, a row for each turn; held against turn 2, the first that finds something kept."""
    rows: list[Row] = []
    first_s = statistics.median(turns[1].ttft_s for turns in kept)
    for number in range(1, TURNS + 1):
        turns = [conversation[number - 1] for conversation in kept]
        ttft_s = statistics.median(turn.ttft_s for turn in turns)
        row: Row = {
            "name": f"turn {number}",
            "prompt": len(turns[0].prompt),
            "cached_tokens": min(turn.cached_tokens for turn in turns),
            "ttft_s": round(ttft_s, 3),
            "over_turn_2": round(ttft_s / first_s, 2) if number > 1 else None,
        }
        if number in ANEW:
            again = [found[number] for found in anew]
            row["anew_cached_tokens"] = max(turn.cached_tokens for turn in again)
            row["anew_ttft_s"] = round(statistics.median(turn.ttft_s for turn in again), 3)
            row["identical"] = all(a.answer == b.answer for a, b in zip(turns, again, strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one conversation instead of three")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, 1 if arguments.quick else 3))


if __name__ == "__main__":
    main()
