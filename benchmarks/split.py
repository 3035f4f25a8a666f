"""One model whole against the same model split over agents, on the same cores, in one run.

    python -m benchmarks.split [--quick] [--folder DIR]

Contenders take turns, round by round, on an otherwise quiet machine; a row's figures are medians over the
rounds, and its ratios are medians of the rounds' ratios. The split model is measured through everything a
user goes through: a client, NATS, the ingress, links. The whole model has no serving in front of it at all.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.table import Row, report
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from schemas.deployment import Settings

SEQUENCES = (1, 8, 32)
PROMPT_TOKENS = 8
NEW_TOKENS = {1: 48, 8: 32, 32: 56}
"""Tokens of each sequence: the first must still run when the prompt of the last has been prefilled."""
PINNED_SEQUENCES = (1, 8)
TTFT_PROMPT_TOKENS = 512
CONTEXT_TOKENS = 2048
"""Its shortest length class holds 128 tokens: room for prompt and output of every sequence here."""


class Worker:
    """A whole-model contender in a process of its own."""

    def __init__(self, kind: str, folder: Path, threads: int, cores: list[int] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.whole", kind, str(folder), str(threads)]
        if cores is not None:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, **command: Any) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a contender died; its message is above")
        answer: dict[str, float] = json.loads(line)
        return answer


class Split:
    """A local cluster with the model cut over its agents."""

    def __init__(self, cluster: LocalCluster, stages: int) -> None:
        self.cluster = cluster
        self.stages = stages

    async def ttft_s(self, prompt: list[int]) -> float:
        async with Client(self.cluster.url, keys=self.cluster.client_keys) as client:
            started = time.perf_counter()
            async with contextlib.aclosing(client.stream(NAME, token_ids=prompt, max_tokens=1)) as tokens:
                async for _ in tokens:
                    return time.perf_counter() - started
        raise RuntimeError("no token came")

    async def decode(self, sequences: int, prompt: list[int], new_tokens: int) -> tuple[float, Row]:
        """Tokens per second while all sequences decode, and where one sequence's time went, in ms a token."""
        async with Client(self.cluster.url, keys=self.cluster.client_keys) as client:
            arrivals: list[list[float]] = [[] for _ in range(sequences)]
            usages: list[Any] = []

            async def one(times: list[float]) -> None:
                async for token in client.stream(NAME, token_ids=prompt, max_tokens=new_tokens, ignore_eos=True):
                    times.append(time.perf_counter())
                    if token.usage is not None:
                        usages.append(token.usage)

            await asyncio.gather(*(one(times) for times in arrivals))
        begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        if end <= begin:  # prompts took so long that the first sequence ended before the last began
            begin, end = min(t[0] for t in arrivals), max(t[-1] for t in arrivals)
        count = sum(begin < t <= end for times in arrivals for t in times)
        usage = usages[-1]
        compute = sum(stage.compute_ms for stage in usage.stages) / new_tokens
        queue = sum(stage.queue_ms for stage in usage.stages) / new_tokens
        parts = {"compute_ms": compute, "queue_ms": queue, "network_ms": usage.network_ms / new_tokens}
        return count / (end - begin), parts

    def uss_bytes(self) -> int:
        agents = [pid for name, pid in self.cluster.processes.items() if name.startswith("n") and name != "nats"]
        return sum(psutil.Process(pid).memory_full_info().uss for pid in agents)


@contextlib.asynccontextmanager
async def split(
    folder: Path, store: Path, stages: int, threads: int, cores: Any = None, *, invariant: bool = True
) -> AsyncIterator[Split]:
    """Agents up and the model deployed over `stages` of them."""
    options = {} if cores is None else {"cores": cores}
    async with LocalCluster(folder, store, agents=stages, threads=threads, **options) as cluster:
        settings = Settings(context_tokens=CONTEXT_TOKENS, max_sequences=max(SEQUENCES), batch_invariant=invariant)
        request = DeployRequest(model=NAME, name=DeploymentName(NAME), stages=stages, settings=settings)
        await deploy_and_wait(cluster.operator, request, timeout_s=300)
        yield Split(cluster, stages)


async def measure(folder: Path, rounds: int) -> None:
    store, _, _ = bench_model(folder)
    cores = sorted(os.sched_getaffinity(0))
    threads = len(cores)
    rng = random.Random(0)
    short = [rng.randrange(2, 32000) for _ in range(PROMPT_TOKENS)]
    long = [rng.randrange(2, 32000) for _ in range(TTFT_PROMPT_TOKENS)]
    ort, genai = Worker("ort", folder, threads), Worker("genai", folder, threads)
    root = store.blobs_folder.parent
    with tempfile.TemporaryDirectory() as temporary:
        async with contextlib.AsyncExitStack() as stack:
            splits = [
                await stack.enter_async_context(split(Path(temporary) / f"s{k}", root, k, threads)) for k in (2, 3)
            ]
            for s in splits:  # everybody warms up
                await s.decode(1, short, NEW_TOKENS[1])
            results = [await one_round(ort, genai, splits, short, long) for _ in range(rounds)]
            memory = {s.stages: s.uss_bytes() for s in splits}
        alone = [row for k in (2, 3) for row in await measure_alone(ort, root, Path(temporary), k, short, rounds)]
        whole_uss = ort.ask(op="memory")["uss_bytes"]
        ort.stop()
        genai.stop()
        pinned = await measure_pinned(folder, root, Path(temporary), cores, short, rounds)
    rows = summary(results, memory, whole_uss) + alone + pinned
    report("split", f"split / whole, {PARAMETERS // 10**6} M parameters, int4", rows, rounds=rounds, raw=results)


async def one_round(ort: Worker, genai: Worker, splits: list[Split], short: list[int], long: list[int]) -> Row:
    """Every contender once, in turn, for every number of sequences and for TTFT."""
    found: Row = {}
    for n in SEQUENCES:
        command = {"op": "decode", "sequences": n, "prompt": short, "new_tokens": NEW_TOKENS[n]}
        found[f"whole {n}"] = ort.ask(**command)["tokens_per_s"]
        for s in splits:
            rate, parts = await s.decode(n, short, NEW_TOKENS[n])
            found[f"split{s.stages} {n}"] = rate
            found[f"split{s.stages} {n} parts"] = parts
        found[f"genai {n}"] = genai.ask(**command)["tokens_per_s"]
    found["whole ttft"] = ort.ask(op="ttft", prompt=long)["ttft_s"]
    for s in splits:
        found[f"split{s.stages} ttft"] = await s.ttft_s(long)
    found["genai ttft"] = genai.ask(op="ttft", prompt=long)["ttft_s"]
    return found


async def measure_alone(
    ort: Worker, store: Path, temporary: Path, stages: int, short: list[int], rounds: int
) -> list[Row]:
    """One sequence with `batch_invariant` off: it runs as a single row, as in the whole model's loop."""
    threads = len(os.sched_getaffinity(0))
    command = {"op": "decode", "sequences": 1, "prompt": short, "new_tokens": NEW_TOKENS[1]}
    results: list[Row] = []
    async with split(temporary / f"alone{stages}", store, stages, threads, invariant=False) as one:
        await one.decode(1, short, NEW_TOKENS[1])
        for _ in range(2 * rounds):
            whole = ort.ask(**command)["tokens_per_s"]
            results.append({"whole": whole, "split": (await one.decode(1, short, NEW_TOKENS[1]))[0]})
    return [
        {
            "name": "same cores, one row",
            "stages": stages,
            "sequences": 1,
            "whole_tokens_per_s": median(results, "whole"),
            "split_tokens_per_s": median(results, "split"),
            "split_over_whole": ratio(results, "split", "whole"),
        }
    ]


async def measure_pinned(
    folder: Path, store: Path, temporary: Path, cores: list[int], short: list[int], rounds: int
) -> list[Row]:
    """Two agents with one core each against the whole model on one core, and on both."""
    if len(cores) < 2:
        return []
    one, both = Worker("ort", folder, 1, cores[:1]), Worker("ort", folder, 2, cores[:2])
    results: list[Row] = []
    async with split(temporary / "pinned", store, 2, 1, cores=[(core,) for core in cores[:2]]) as two:
        for _ in range(rounds):
            found: Row = {}
            for n in PINNED_SEQUENCES:
                command = {"op": "decode", "sequences": n, "prompt": short, "new_tokens": NEW_TOKENS[n]}
                found[f"one {n}"] = one.ask(**command)["tokens_per_s"]
                found[f"both {n}"] = both.ask(**command)["tokens_per_s"]
                found[f"split {n}"], _ = await two.decode(n, short, NEW_TOKENS[n])
            results.append(found)
    one.stop()
    both.stop()
    rows = []
    for n in PINNED_SEQUENCES:
        rows.append(
            {
                "name": "one pinned core per agent",
                "stages": 2,
                "sequences": n,
                "whole_tokens_per_s": median(results, f"both {n}"),
                "split_tokens_per_s": median(results, f"split {n}"),
                "split_over_whole": ratio(results, f"split {n}", f"both {n}"),
                "split_over_one_core": ratio(results, f"split {n}", f"one {n}"),
            }
        )
    return rows


def summary(results: list[Row], memory: dict[int, int], whole_uss: float) -> list[Row]:
    """One row per (stages, sequences), one per (stages, TTFT), one per (stages, memory)."""
    rows: list[Row] = []
    for k in memory:
        for n in SEQUENCES:
            parts = [r[f"split{k} {n} parts"] for r in results]
            rows.append(
                {
                    "name": "same cores, decode",
                    "stages": k,
                    "sequences": n,
                    "whole_tokens_per_s": median(results, f"whole {n}"),
                    "genai_tokens_per_s": median(results, f"genai {n}"),
                    "split_tokens_per_s": median(results, f"split{k} {n}"),
                    "split_over_whole": ratio(results, f"split{k} {n}", f"whole {n}"),
                    "whole_over_genai": ratio(results, f"whole {n}", f"genai {n}"),
                    **{name: median(parts, name) for name in ("compute_ms", "queue_ms", "network_ms")},
                }
            )
    for k, uss in memory.items():
        rows.append(
            {
                "name": f"same cores, TTFT {TTFT_PROMPT_TOKENS} tokens, s",
                "stages": k,
                "sequences": 1,
                "whole_ttft_s": median(results, "whole ttft"),
                "genai_ttft_s": median(results, "genai ttft"),
                "split_ttft_s": median(results, f"split{k} ttft"),
                "ttft_over_whole": ratio(results, f"split{k} ttft", "whole ttft"),
            }
        )
        rows.append(
            {
                "name": "private memory, MB",
                "stages": k,
                "whole_mb": whole_uss / 1e6,
                "split_mb": uss / 1e6,
                "over_whole_mb_per_agent": (uss - whole_uss) / 1e6 / k,
            }
        )
    return rows


def median(rows: list[Row], name: str) -> float:
    return round(float(statistics.median(row[name] for row in rows)), 4)


def ratio(rows: list[Row], above: str, below: str) -> float:
    """The median of the rounds' ratios: a slow minute slows both."""
    return round(float(statistics.median(row[above] / row[below] for row in rows)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one round instead of two")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, 1 if arguments.quick else 2))


if __name__ == "__main__":
    main()
