"""What the journal of accepted requests costs a decode round: `python -m benchmarks.journal [--quick]`.

A round is one token of every sequence, each said to a client in a reply of its own. Rounds come every 13 ms, as a
decode step of a small model takes. They are said at once in one run and after they were journalled in the next:
processor time is the difference of the two, medians over turns. Latency runs from handing a round over until its
tokens may be said; the next step of the model does not wait for it. `always` is nats-server with
`sync_interval: always`, as in the configuration that `resplit init` writes.
"""

import argparse
import asyncio
import contextlib
import os
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
TURNS = 5
REPLY = b'{"request_id":"9fc5d0a1b2c3d4e5","index":117,"token_id":31245,"text":" the"}'
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


async def spent_us(nats: psutil.Process, rounds: int, act: Callable[[int], None]) -> tuple[float, float]:
    """Processor time of this process and of the server, a round."""
    before, nats_before = time.process_time(), nats.cpu_times()
    await paced(rounds, act)
    after, nats_after = time.process_time(), nats.cpu_times()
    nats_s = nats_after.user + nats_after.system - nats_before.user - nats_before.system
    return (after - before) / rounds * 1e6, nats_s / rounds * 1e6


async def reply_forever(client: Client, outbox: "asyncio.Queue[int]") -> None:
    """What an ingress does with what may be said."""
    while True:
        await client.publish(f"_INBOX.{await outbox.get()}", REPLY)


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
    outbox: asyncio.Queue[int] = asyncio.Queue()
    replying = asyncio.create_task(reply_forever(client, outbox))
    waited: list[float] = []

    def say() -> None:
        for i in range(sequences):
            outbox.put_nowait(i)

    def say_stored(handed: float) -> None:
        waited.append(time.perf_counter() - handed)
        say()

    def journal_round(index: int) -> None:
        runs = [Run(handle, index, (index * 31 % 128_000,)) for handle in handles]
        handed = time.perf_counter()
        journal.tokens(runs, lambda: say_stored(handed))

    client_us: list[float] = []
    nats_us: list[float] = []
    turn = rounds // TURNS
    for first in range(0, rounds, turn):
        plain = await spent_us(nats, turn, lambda index: say())
        with_journal = await spent_us(nats, turn, lambda index, first=first: journal_round(first + index))  # type: ignore[misc]
        client_us.append(with_journal[0] - plain[0])
        nats_us.append(with_journal[1] - plain[1])
    await journal.drain(STOP_S)
    assert len(waited) == rounds
    started = time.perf_counter()
    recovered = await fence(client, CHAT, life, LifeId("n1-0"))
    fenced_s = time.perf_counter() - started
    assert all(len(request.tokens) == rounds for request in recovered.requests)
    running.cancel()
    replying.cancel()
    await asyncio.wait([running, replying])
    client_cpu_us = statistics.median(client_us)
    return {
        "name": f"sync {sync}",
        "sequences": sequences,
        "latency_us_p50": round(statistics.median(waited) * 1e6),
        "latency_us_p99": round(statistics.quantiles(waited, n=100)[98] * 1e6),
        "client_cpu_us": round(client_cpu_us),
        "client_cpu_over_step": round(client_cpu_us / (STEP_S * 1e6), 4),
        "nats_cpu_us": round(statistics.median(nats_us)),
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
    title = f"the journal's cost per decode round of {STEP_S * 1e3:g} ms"
    report("journal", title, rows, rounds=rounds, load_average=os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    uvloop.run(measure(ROUNDS // 4 if parser.parse_args().quick else ROUNDS))


if __name__ == "__main__":
    main()
