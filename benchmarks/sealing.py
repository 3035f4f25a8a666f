"""What sealing a request costs: `python -m benchmarks.sealing [--quick] [--adder] [--folder DIR]`.

The same streams in the open and sealed, by turns, over two agents that share all cores: the time to the first token and
the tokens a second of one round, the sealed one's over the other's. Once with the decoder that speed is measured on
(not with `--adder`), once with the adder of the demonstration, whose tokens take so little that whatever is done for
each of them shows. Then what each operation takes by itself.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.resplit import TIMEOUT_S, placements
from benchmarks.table import Row, report
from benchmarks.watch import Stream
from bus.letters import MAX_READERS
from bus.sealed_requests import Seal, open_request, seal_request
from models.store import Store
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from resplit.demo import MODEL, shipped_store
from resplit.sealing import Sealer
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.codec import JSON
from schemas.control import DeployRequest
from schemas.deployment import Settings
from schemas.journal import Run

SEQUENCES = (1, 8)
PROMPT_TOKENS = 8
NEW_TOKENS = 48
TIMES = 300
REQUEST = b'{"request_id":"r","prompt":"' + b"x" * 500 + b'"}'
REPLY = b"x" * 150
"""As long as one of a stream."""


async def measure(folder: Path | None, rounds: int) -> None:
    """`folder` has the decoder that speed is measured on; None: the adder alone."""
    rows: list[Row] = []
    if folder is not None:
        store, _, _ = bench_model(folder)
        shown = f"{PARAMETERS // 10**6} M, int4"
        rows += await compared(
            store.blobs_folder.parent, NAME, shown, 32000, Settings(context_tokens=512, max_sequences=8), rounds
        )
    rows += await compared(shipped_store(), MODEL, "adder", 20, Settings(context_tokens=64), rounds)
    title = "sealed requests over open ones, 2 agents"
    report("sealing", title, [*rows, *operations()], rounds=rounds, load_average=os.getloadavg())


async def compared(store: Path, model: str, shown: str, vocabulary: int, settings: Settings, rounds: int) -> list[Row]:
    """Both ways of asking, by turns; a row for each number of sequences."""
    rng, numbers = random.Random(0), itertools.count()
    prompt = [rng.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS)]
    found: dict[int, list[dict[bool, tuple[float, float]]]] = {n: [] for n in SEQUENCES}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        async with LocalCluster(Path(temporary) / "c", store, agents=2, threads=cores) as cluster:
            keys = cluster.client_keys
            sealer = Sealer(keys)
            async with Client(cluster.url, keys=keys) as plain, Client(cluster.url, keys=keys, sealer=sealer) as sealed:
                opened = Store(store)
                home = placements(len(opened.manifest(opened.resolve(model)).blocks))["home"]
                deployment = DeploymentName(model)
                request = DeployRequest(model=model, name=deployment, placement=home, settings=settings)
                await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
                for i, n in itertools.product(range(-1, rounds), SEQUENCES):
                    turn: dict[bool, tuple[float, float]] = {}
                    for is_sealed in (False, True) if i % 2 else (True, False):
                        streams = [Stream(prompt, NEW_TOKENS, f"bench-{next(numbers)}") for _ in range(n)]
                        turn[is_sealed] = await one(sealed if is_sealed else plain, deployment, streams)
                    print(shown, n, turn, flush=True)
                    if i >= 0:  # in the round before, everybody warms up
                        found[n].append(turn)
    return [{"name": shown, "sequences": n, **summary(turns)} for n, turns in found.items()]


async def one(client: Client, deployment: DeploymentName, streams: list[Stream]) -> tuple[float, float]:
    """Mean seconds to the first token, and tokens a second from the first to the last."""
    began = time.time()
    await asyncio.gather(*(stream.run(client, deployment) for stream in streams))
    assert all(len(stream.ids) == stream.tokens_wanted for stream in streams), [stream.error for stream in streams]
    first, last = min(stream.times[0] for stream in streams), max(stream.times[-1] for stream in streams)
    ttft_s = statistics.mean(stream.times[0] - began for stream in streams)
    return ttft_s, sum(len(stream.ids) - 1 for stream in streams) / (last - first)


def summary(turns: list[dict[bool, tuple[float, float]]]) -> Row:
    """Medians of both, and the quartiles of the rounds' ratios."""
    row: Row = {}
    for place, name in enumerate(("ttft", "rate")):
        for is_sealed, way in ((False, "open"), (True, "sealed")):
            row[f"{name}_{way}"] = statistics.median(turn[is_sealed][place] for turn in turns)
        ratios = [turn[True][place] / turn[False][place] for turn in turns]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row |= {f"{name}_ratio": middle, f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return row


def operations() -> list[Row]:
    """What each operation takes, by itself, in microseconds: medians."""
    deployment, request, me = DeploymentName("chat"), RequestId("r"), NodeId("n00")
    keys = {NodeId(f"n{i:02}"): X25519PrivateKey.generate() for i in range(MAX_READERS)}
    readers = {name: key.public_key() for name, key in keys.items()}
    seal = Seal(bytes(32), deployment, request)
    few = dict(list(readers.items())[:3])
    letter, _ = seal_request(REQUEST, JSON, deployment, request, few)
    reply, run = seal.seal_reply(REPLY), Run(1, 7, (1234,))
    done: dict[str, Callable[[], object]] = {
        "seal a request, 1 reader": lambda: seal_request(REQUEST, JSON, deployment, request, {me: readers[me]}),
        "seal a request, 3 readers": lambda: seal_request(REQUEST, JSON, deployment, request, few),
        f"seal a request, {MAX_READERS} readers": lambda: seal_request(REQUEST, JSON, deployment, request, readers),
        "open a request": lambda: open_request(letter, deployment, request, me, keys[me]),
        "seal a reply": lambda: seal.seal_reply(REPLY),
        "open a reply": lambda: seal.open_reply(reply),
        "seal a token for the journal": lambda: seal.seal_run(run),
    }
    return [{"name": name, "us": _median_us(call)} for name, call in done.items()]


def _median_us(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="four rounds instead of 24")
    parser.add_argument("--adder", action="store_true", help="without the large decoder")
    arguments = parser.parse_args()
    asyncio.run(measure(None if arguments.adder else arguments.folder, 4 if arguments.quick else 24))


if __name__ == "__main__":
    main()
