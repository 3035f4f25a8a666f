"""What the HTTP gateway costs beside the subjects, how many streams it carries, and when its dashboard is there.

    python -m benchmarks.gateway [--quick] [--folder DIR]

One client at a time asks the same deployment by turns over HTTP (server-sent events) and over the bus; then many ask at
once, by either way. Each is a process of its own beside the gateway's, as an application would be.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2

import models
from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.table import Row, report
from models.store import Store
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from schemas.deployment import Settings

Way = Literal["bus", "http"]
WAYS: tuple[Way, Way] = ("bus", "http")
BENCH, ADDER = DeploymentName("bench"), DeploymentName("adder")
TOKENS, TIMEOUT_S = 48, 300.0
PROMPT = "the quick brown fox jumps over the lazy dog while one two three"
MANY, MANY_TOKENS = 200, 24
PAINTS = 5


@dataclass(frozen=True)
class Met:
    """One stream: to its first token, and from that to its last."""

    first_s: float
    rest_s: float
    tokens: int


async def measure(folder: Path, pairs: int) -> None:
    store, _, _ = bench_model(folder)
    cores = len(os.sched_getaffinity(0))
    found: dict[Way, list[Met]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        root = store.blobs_folder.parent
        async with (
            LocalCluster(Path(temporary) / "c", root, agents=2, threads=cores, http_port=0) as cluster,
            Client(cluster.url, keys=cluster.client_keys) as client,
            httpx2.AsyncClient(base_url=cluster.http_url, timeout=TIMEOUT_S) as http,
        ):
            request = DeployRequest(name=BENCH, model=NAME, stages=2, settings=Settings(max_sequences=2))
            await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
            for number in range(-2, pairs):
                for way in WAYS if number % 2 else WAYS[::-1]:
                    # Another beginning each time: a prompt whose caches were kept is another matter.
                    prompt = f"{number} {way} {PROMPT}"
                    met = await _stream(way, client, http, BENCH, prompt, TOKENS)
                    if number >= 0:
                        found[way].append(met)
    rows = [_single(way, found[way]) for way in WAYS]
    first_ms = _median_ms(found["http"]) - _median_ms(found["bus"])
    pace = _pace(found["http"]) / _pace(found["bus"])
    rows.append({"name": "HTTP beside the bus", "ttft_ms": round(first_ms, 2), "tokens_per_s": round(pace, 4)})
    many = await _many()
    page = await _page()
    title = f"A decoder of {PARAMETERS // 1_000_000} M parameters in int4 over two agents, {TOKENS} tokens, by turns"
    report("gateway", title, rows, pairs=pairs, many=many, page=page, load_average=os.getloadavg())
    print(json.dumps({"many": many, "page": page}, indent=1))


async def _many() -> list[Row]:
    """So many streams at once, of a small model."""
    store = Store(Path(models.__path__[0]) / "adder" / "store")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        async with (
            LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=1, threads=1, http_port=0) as cluster,
            Client(cluster.url, keys=cluster.client_keys) as client,
            httpx2.AsyncClient(
                base_url=cluster.http_url, timeout=TIMEOUT_S, limits=httpx2.Limits(max_connections=2 * MANY)
            ) as http,
        ):
            settings = Settings(context_tokens=64, max_sequences=MANY, max_queued=2 * MANY)
            await deploy_and_wait(
                cluster.operator, DeployRequest(name=ADDER, model="adder", settings=settings), TIMEOUT_S
            )
            for way in (*WAYS, *WAYS):
                began = time.perf_counter()
                asked = [_stream(way, client, http, ADDER, f"{n}+1=", MANY_TOKENS) for n in range(MANY)]
                found = await asyncio.gather(*asked, return_exceptions=True)
                took_s = time.perf_counter() - began
                done = [one for one in found if isinstance(one, Met)]
                rows.append({
                    "name": f"{MANY} streams at once over {way}",
                    "errors": len(found) - len(done),
                    "tokens_per_s": round(sum(one.tokens for one in done) / took_s, 1),
                    "ttft_p95_ms": round(1e3 * sorted(one.first_s for one in done)[int(0.95 * len(done))], 1),
                })  # fmt: skip
    return rows


async def _page() -> Row:
    """How large the dashboard is, and when Chromium paints it first; None where there is no Chromium."""
    store = Store(Path(models.__path__[0]) / "adder" / "store")
    with tempfile.TemporaryDirectory() as temporary:
        async with LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=3, http_port=0) as cluster:
            request = DeployRequest(name=ADDER, model="adder", stages=3)
            await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
            async with httpx2.AsyncClient(base_url=cluster.http_url) as http:
                files = [await http.get(f"/dashboard/{name}") for name in ("", "style.css", "dashboard.js")]
            found: Row = {"bytes": sum(len(one.content) for one in files), "first_paint_ms": None, "drawn_ms": None}
            if (chromium := shutil.which("chromium")) is not None:
                found |= await _painted(chromium, f"{cluster.http_url}/dashboard/")
            return found


async def _painted(chromium: str, url: str) -> Row:
    from playwright.async_api import async_playwright  # noqa: PLC0415 - only this needs it

    paints, drawn = [], []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(PAINTS):
            context = await browser.new_context()
            page = await context.new_page()
            await page.goto(url)
            await page.wait_for_selector("#deployments article svg")
            entries: list[dict[str, Any]] = await page.evaluate(
                "() => performance.getEntriesByType('paint').map(e => ({name: e.name, at: e.startTime}))"
            )
            drawn.append(await page.evaluate("() => performance.now()"))
            paints.append(next(entry["at"] for entry in entries if entry["name"] == "first-contentful-paint"))
            await context.close()
        await browser.close()
    return {"first_paint_ms": round(statistics.median(paints), 1), "drawn_ms": round(statistics.median(drawn), 1)}


async def _stream(
    way: Way, client: Client, http: httpx2.AsyncClient, name: DeploymentName, prompt: str, tokens: int
) -> Met:
    began, arrived = time.perf_counter(), list[float]()
    if way == "bus":
        async for _ in client.stream(name, prompt, max_tokens=tokens, ignore_eos=True, logprobs=1):
            arrived.append(time.perf_counter())
    else:
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        # Every token is an event, also one that is no text yet.
        async with http.stream("POST", "/v1/completions", json={**body, "logprobs": 1}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in line[:12], line
                    arrived.append(time.perf_counter())
    if len(arrived) != tokens:
        raise AssertionError(f"{len(arrived)} of {tokens} tokens came over {way}")
    return Met(arrived[0] - began, arrived[-1] - arrived[0], tokens)


def _single(way: Way, found: Sequence[Met]) -> Row:
    name = "over the bus" if way == "bus" else "over HTTP"
    return {"name": name, "ttft_ms": round(_median_ms(found), 2), "tokens_per_s": round(_pace(found), 3)}


def _median_ms(found: Sequence[Met]) -> float:
    return 1e3 * statistics.median(one.first_s for one in found)


def _pace(found: Sequence[Met]) -> float:
    return statistics.median((one.tokens - 1) / one.rest_s for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--pairs", type=int, default=24, help="answers, each asked both ways")
    parser.add_argument("--quick", action="store_true", help="four pairs")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, 4 if arguments.quick else arguments.pairs))


if __name__ == "__main__":
    main()
