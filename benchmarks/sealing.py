"""What sealing a request costs: `python -m benchmarks.sealing [--quick] [--adder] [--folder DIR]`.

The same streams in the open and sealed, by turns, over two agents that share all cores, in many short rounds of one of
each: the time to the first token; the tokens a second of decoding, from when every stream has its first token until one
has all; and the processor time of everybody, client and cluster, for a token since then. A ratio is of one round,
sealed over open, and what is told is their median with the 95 % interval that the order of the ratios gives: it takes
no shape for granted, and a round that another program disturbed is one among many. Processor time is what a busy
machine leaves comparable.

Once with the decoder that speed is measured on (not with `--adder`), once with the adder of the demonstration, whose
tokens take so little that whatever is done for each of them shows. Then what each operation takes by itself.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.paired import median_interval
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
ROUNDS, QUICK_ROUNDS = 32, 6
TOKENS, ADDER_TOKENS = 32, 48
"""New ones of each stream: rounds are short, and there are many."""
ADDER_TIMES = 5
"""As many times more rounds of the adder, which are over in a second."""
TIMES = 300
COLD_BYTES = 32 << 20
"""More than a processor's caches hold."""
FOR_A_TOKEN = ("seal a reply", "open a reply", "seal a token for the journal")
REQUEST = b'{"request_id":"r","prompt":"' + b"x" * 500 + b'"}'
REPLY = b"x" * 150
"""As long as one of a stream."""


@dataclass(frozen=True)
class Measured:
    """One way of asking in one round."""

    ttft_s: float
    """Mean over the streams."""
    rate: float
    """Tokens a second while all streams decode: none waits for its first token, and none has ended."""
    cpu_ms: float
    """Milliseconds of a processor that client and cluster took for a token, once every stream had its first."""


Turn = dict[bool, Measured]
"""A round: in the open, and sealed."""


async def measure(folder: Path | None, rounds: int) -> None:
    """`folder` has the decoder that speed is measured on; None: the adder alone."""
    rows: list[Row] = []
    if folder is not None:
        store, _, _ = bench_model(folder)
        shown = f"{PARAMETERS // 10**6} M, int4"
        settings = Settings(context_tokens=512, max_sequences=8)
        rows += await compared(store.blobs_folder.parent, NAME, shown, 32000, settings, TOKENS, rounds)
    adder, settings = shipped_store(), Settings(context_tokens=64)
    rows += await compared(adder, MODEL, "adder", 20, settings, ADDER_TOKENS, rounds * ADDER_TIMES)
    title = "sealed requests over open ones, 2 agents"
    report("sealing", title, [*rows, *operations()], rounds=rounds, load_average=os.getloadavg())


async def compared(
    store: Path, model: str, shown: str, vocabulary: int, settings: Settings, tokens: int, rounds: int
) -> list[Row]:
    """Both ways of asking, by turns; a row for each number of sequences."""
    rng, numbers = random.Random(0), itertools.count()
    prompt = [rng.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS)]
    found: dict[int, list[Turn]] = {n: [] for n in SEQUENCES}
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
                processes = [psutil.Process(pid) for pid in (os.getpid(), *cluster.processes.values())]
                for i, n in itertools.product(range(-1, rounds), SEQUENCES):
                    turn: Turn = {}
                    for is_sealed in (False, True) if i % 2 else (True, False):
                        streams = [Stream(prompt, tokens, f"bench-{next(numbers)}") for _ in range(n)]
                        turn[is_sealed] = await one(sealed if is_sealed else plain, deployment, streams, processes)
                    print(shown, n, turn, flush=True)
                    if i >= 0:  # in the round before, everybody warms up
                        found[n].append(turn)
    return [{"name": shown, "sequences": n, "rounds": rounds, **summary(turns)} for n, turns in found.items()]


async def one(
    client: Client, deployment: DeploymentName, streams: list[Stream], processes: Sequence[psutil.Process]
) -> Measured:
    """What these streams took, all asked at once."""
    began = time.time()
    running = asyncio.gather(*(stream.run(client, deployment) for stream in streams))
    await asyncio.gather(*(stream.reached(1) for stream in streams))
    prefilled, busy_s = _tokens(streams), _busy_s(processes)
    await running
    decoded, busy_s = _tokens(streams) - prefilled, _busy_s(processes) - busy_s
    assert all(len(stream.ids) == stream.tokens_wanted for stream in streams), [stream.error for stream in streams]
    first, last = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
    between = sum(first < at <= last for stream in streams for at in stream.times)
    ttft_s = statistics.mean(stream.times[0] - began for stream in streams)
    return Measured(ttft_s, between / (last - first), 1e3 * busy_s / decoded)


def _tokens(streams: Sequence[Stream]) -> int:
    return sum(len(stream.ids) for stream in streams)


def _busy_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(taken.user + taken.system for taken in times)


def summary(turns: Sequence[Turn]) -> Row:
    """Medians of both ways, and of the rounds' ratios."""
    row: Row = {}
    for name in ("ttft_s", "rate", "cpu_ms"):
        for is_sealed, way in ((False, "open"), (True, "sealed")):
            row[f"{name}_{way}"] = statistics.median(getattr(turn[is_sealed], name) for turn in turns)
        ratios = [getattr(turn[True], name) / getattr(turn[False], name) for turn in turns]
        low, high = median_interval(ratios)
        row |= {f"{name}_ratio": statistics.median(ratios), f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return row


def operations() -> list[Row]:
    """What each operation takes, by itself, in microseconds: medians, over and over, and after other memory was used,
    as between two steps of a model."""
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
        FOR_A_TOKEN[0]: lambda: seal.seal_reply(REPLY),
        FOR_A_TOKEN[1]: lambda: seal.open_reply(reply),
        FOR_A_TOKEN[2]: lambda: seal.seal_run(run),
    }
    other = np.zeros(COLD_BYTES, np.uint8)
    return [
        {"name": name, "us": _median_us(call, lambda: None), "cold_us": _median_us(call, lambda: other.__iadd__(1))}
        for name, call in done.items()
    ]


def _median_us(call: Callable[[], object], before: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMES):
        before()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--adder", action="store_true", help="without the large decoder")
    arguments = parser.parse_args()
    asyncio.run(measure(None if arguments.adder else arguments.folder, QUICK_ROUNDS if arguments.quick else ROUNDS))


if __name__ == "__main__":
    main()
