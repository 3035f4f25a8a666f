"""What TLS to the NATS server costs, beside the same without: `python -m benchmarks.tls [--asyncio]`.

Two servers and two clients each, in this process and in the event loop of agents, asked by turns: how long a connection
with its login takes, and the round trip of a question and its answer of some bytes, through the server. The server
without TLS lets everybody in.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from benchmarks.table import Row, report
from bus.identity import load_credentials
from bus.natsconf import LOGINS_FILE
from bus.server_certificate import server_files
from bus.together import CLIENT, CLUSTER, make_members
from natstls.client import SafeClient
from resplit.server import NatsServer, nats_program
from schemas.base import NodeId

SIZES = (200, 1 << 16, 1 << 19)
N0 = NodeId("n0")
SUBJECT = "resplit.v1.infer.bench"
STEPS = 20
READY_S = 10.0


async def measure(rounds: int) -> None:
    taken: dict[tuple[str, bool], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_members(folder / "keys", [N0])
        cluster = folder / "keys" / CLUSTER
        server = NatsServer(folder / "tls", (cluster / LOGINS_FILE).read_text, server_files(cluster))
        await server.start()
        with _open_server(folder / "plain") as plain:
            urls = {True: server.url, False: plain}
            logins = {name: dict(load_credentials(folder / "keys" / name).nats_options) for name in (N0, CLIENT)}
            for _ in range(rounds):
                for tls, url in urls.items():
                    await _round(url, logins, tls, taken)
        await server.child.stop()
    rows: list[Row] = []
    for what in dict.fromkeys(name for name, _ in taken):
        plain_ms, tls_ms = (1e3 * statistics.median(taken[what, tls]) for tls in (False, True))
        rows.append({"name": what, "plain_ms": round(plain_ms, 3), "tls_ms": round(tls_ms, 3)})
    report("tls", "TLS to the NATS server, medians", rows, rounds=rounds, load_average=os.getloadavg())


async def _round(
    url: str, logins: dict[NodeId, dict[str, Any]], tls: bool, taken: dict[tuple[str, bool], list[float]]
) -> None:
    asks, answers = [await _connected(url, logins[name] if tls else {}, taken, tls) for name in (CLIENT, N0)]

    async def echo(message: Msg) -> None:
        await answers.publish(message.reply, message.data)

    await answers.subscribe(SUBJECT, "ingress", cb=echo)
    await answers.flush()
    await asyncio.sleep(0.1)
    for size in SIZES:
        body = os.urandom(size)
        for _ in range(STEPS):
            began = time.perf_counter()
            await asks.request(SUBJECT, body, timeout=READY_S)
            taken[f"there and back, {size} bytes", tls].append(time.perf_counter() - began)
    for client in (asks, answers):
        await client.close()


async def _connected(url: str, login: dict[str, Any], taken: dict[tuple[str, bool], list[float]], tls: bool) -> Nats:
    client = SafeClient() if tls else Nats()
    began = time.perf_counter()
    await client.connect(url, **login)
    taken["connect", tls].append(time.perf_counter() - began)
    return client


@contextmanager
def _open_server(folder: Path) -> Iterator[str]:
    folder.mkdir()
    options = ["-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(folder)]
    with (folder / "log").open("wb") as log, subprocess.Popen([str(nats_program()), *options], stderr=log) as process:
        try:
            until = time.monotonic() + READY_S
            while not (found := list(folder.glob("*.ports"))) or not found[0].read_text():
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.02)
            url: str = json.loads(found[0].read_text())["nats"][0]
            yield url
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--asyncio", action="store_true", help="asyncio's own event loop, as in an application")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=None if arguments.asyncio else uvloop.new_event_loop) as runner:
        runner.run(measure(arguments.rounds))


if __name__ == "__main__":
    main()
