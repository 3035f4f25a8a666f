"""What the journal of accepted requests costs a decode round: `python -m benchmarks.journal [--quick]`.

A round is one token of every sequence. Rounds come every 13 ms, as a decode step of a small model takes, and the
same pace is kept once without the journal: processor time is the difference of the two. Latency runs from handing a
round over until its tokens may be said; the next step of the model does not wait for it. `always` is nats-server with
`sync_interval: always`, as `deploy/nats-server.conf` has it.
"""

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import uvloop
from nats.aio.client import Client

from benchmarks.table import Row, report
from bus.connection import connect
from bus.journal import Journal
from bus.streams import ensure_streams
from bus.succession import fence
from resplit.server import nats_program
from schemas.base import DeploymentName, LifeId, RequestId
from schemas.journal import AcceptedRequest, Run

SEQUENCES = (1, 8, 32)
STEP_S = 0.013
ROUNDS = 600
PROMPT_BYTES = 2000
STOP_S = 10.0
CHAT = DeploymentName("chat")


@contextlib.contextmanager
def server(folder: Path, sync: str) -> Iterator[tuple[str, psutil.Process]]:
    """A nats-server with JetStream, its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    always = "sync_interval: always" if sync == "always" else ""
    config = folder / "nats.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder / "js"}"\n{always}\n}}\n')
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([nats_program(), "-c", config], stdout=log, stderr=log)
    try:
        yield f"nats://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def paced(rounds: int, act: Callable[[int], None]) -> None:
    """Call `act` once every step, with its number."""
    due = time.perf_counter()
    for index in range(rounds):
        act(index)
        due += STEP_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


def spent_s(process: psutil.Process) -> float:
    """Processor time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure_rounds(client: Client, sync: str, sequences: int, rounds: int, nats: psutil.Process) -> Row:
    """One row of the table."""
    life = LifeId(f"n0-{sequences}")
    journal = Journal(client, CHAT, life, lambda error: None, time.monotonic)
    running = asyncio.create_task(journal.run())
    prompt = b"x" * PROMPT_BYTES
    requests = [AcceptedRequest(RequestId(f"r{i}"), "0" * 64, prompt, "", f"_INBOX.{i}") for i in range(sequences)]
    started = time.perf_counter()
    handles = await asyncio.gather(*(journal.accept(request) for request in requests))
    accept_s = time.perf_counter() - started
    waited: list[float] = []

    def go(index: int) -> None:
        handed = time.perf_counter()
        runs = [Run(handle, index, (index * 31 % 128_000,)) for handle in handles]
        journal.tokens(runs, lambda: waited.append(time.perf_counter() - handed))

    before, nats_before = time.process_time(), spent_s(nats)
    await paced(rounds, lambda index: None)
    idle, nats_idle = time.process_time() - before, spent_s(nats) - nats_before
    before, nats_before = time.process_time(), spent_s(nats)
    await paced(rounds, go)
    busy, nats_busy = time.process_time() - before, spent_s(nats) - nats_before
    await journal.drain(STOP_S)
    assert len(waited) == rounds
    started = time.perf_counter()
    recovered = await fence(client, CHAT, life, LifeId("n1-0"))
    fenced_s = time.perf_counter() - started
    assert all(len(request.tokens) == rounds for request in recovered.requests)
    running.cancel()
    await asyncio.wait([running])
    client_us = (busy - idle) / rounds * 1e6
    return {
        "name": f"sync {sync}",
        "sequences": sequences,
        "latency_us_p50": round(statistics.median(waited) * 1e6),
        "latency_us_p99": round(statistics.quantiles(waited, n=100)[98] * 1e6),
        "client_cpu_us": round(client_us),
        "client_cpu_over_step": round(client_us / (STEP_S * 1e6), 4),
        "nats_cpu_us": round((nats_busy - nats_idle) / rounds * 1e6),
        "accept_all_ms": round(accept_s * 1e3, 2),
        "fence_and_read_ms": round(fenced_s * 1e3, 1),
    }


async def measure(rounds: int) -> None:
    rows: list[Row] = []
    for sync in ("default", "always"):
        with tempfile.TemporaryDirectory() as folder, server(Path(folder), sync) as (url, nats):
            client = await connect(url, "bench")
            await ensure_streams(client)
            for sequences in SEQUENCES:
                rows.append(await measure_rounds(client, sync, sequences, rounds, nats))
            await client.close()
    report("journal", f"the journal's cost per decode round of {STEP_S * 1e3:g} ms", rows, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    uvloop.run(measure(ROUNDS // 4 if parser.parse_args().quick else ROUNDS))


if __name__ == "__main__":
    main()
