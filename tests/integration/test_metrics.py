"""What agents and orchestrators show Prometheus, read from real processes."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from models.store import Store
from profiler.exposition import exposed
from resplit.child import Child
from resplit.cluster import free_port
from schemas.errors import ResplitError
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    Oracle,
    Serving,
    serving,
    three_stages,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    async with serving(tmp_path_factory.mktemp("metrics") / "cluster", zoo_store, oracle) as found:
        await found.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        yield found


def command(running: Serving, *arguments: str, keys: str, store: Path) -> list[str]:
    cluster = running.cluster
    at = ["--url", cluster.url, "--keys", str(cluster.keys / keys), "--store", str(store)]
    return [sys.executable, "-m", "resplit", *arguments, *at]


async def read(port: int) -> Figures:
    async with httpx2.AsyncClient() as client:
        page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


async def until(port: int, true: Callable[[Figures], bool], timeout_s: float = 40) -> Figures:
    found: Figures = {}
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    found = await read(port)
                    if true(found):
                        return found
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.2)
    except TimeoutError as error:
        raise AssertionError(f"the figures stay {found}") from error


def at(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def test_metrics_of_an_agent(running: Serving, tmp_path: Path) -> None:
    cluster, port = running.cluster, free_port()
    await cluster.stop(N0)
    arguments = command(
        running, "agent", N0, "--provider", "cpu", "--threads", "1", "--metrics", f"127.0.0.1:{port}",
        keys=N0, store=cluster.folder / N0 / "store",
    )  # fmt: skip
    child = Child(N0, arguments, tmp_path / "log")
    await child.start()
    try:
        serves = at("resplit_stage_sequences", node=N0, deployment=CHAT, epoch="1", state="serving")
        before = await until(port, lambda found: any(key[0] == serves[0] for key in found))
        assert before[at("resplit_node_memory_total_bytes", node=N0)] > 1e9
        assert 0 <= before[at("resplit_node_load_ratio", node=N0)] <= 1
        assert before[at("resplit_node_unguided_seconds", node=N0)] == 0
        await until(port, lambda found: at("resplit_link_rtt_seconds", node=N0, peer=N1) in found)
        for number in range(4):
            await running.client.complete(CHAT, f"{PROMPT} {number}", max_tokens=4, ignore_eos=True)
        name = "gen_ai_server_time_per_output_token_seconds_count"
        after = await until(port, lambda found: found.get(at(name, gen_ai_request_model=CHAT), 0) >= 4)
        assert after[at("gen_ai_server_time_to_first_token_seconds_count", gen_ai_request_model=CHAT)] >= 4
        assert after[at("resplit_requests_arrived_total", node=N0, deployment=CHAT)] >= 4
        assert after[at("resplit_output_tokens_total", node=N0, deployment=CHAT)] >= 16
        assert after[at("resplit_audit_events_total", source=N0, kind="request_ended")] >= 4
    finally:
        await child.stop()
        await cluster.start(N0)


async def test_metrics_of_orchestrators_follow_who_leads(running: Serving, tmp_path: Path) -> None:
    cluster, port = running.cluster, free_port()
    arguments = command(
        running, "orchestrator", "--id", "second", "--metrics", f"127.0.0.1:{port}",
        keys="orchestrator", store=cluster.store,
    )  # fmt: skip
    child = Child("second", arguments, tmp_path / "log")
    await child.start()
    try:
        stands_by = await until(port, lambda found: at("resplit_orchestrator_leads") in found)
        assert stands_by[at("resplit_orchestrator_leads")] == 0
        await cluster.kill("orchestrator")
        leads = await until(port, lambda found: found[at("resplit_orchestrator_leads")] == 1)
        leads = await until(port, lambda found: at("resplit_deployment_epoch", deployment=CHAT) in found)
        assert leads[at("resplit_orchestrator_term")] >= 2
        assert leads[at("resplit_node_up", node=N1)] == 1
        states = {key: value for key, value in leads.items() if key[0] == "resplit_deployment_state"}
        assert sum(states.values()) == 1
        assert leads[at("resplit_deployment_stages", deployment=CHAT)] == 3
        assert leads[at("resplit_audit_events_total", source="orchestrator", kind="leader_elected")] == 1
    finally:
        await child.stop()
        await cluster.start("orchestrator")


async def test_an_address_that_is_none_or_taken_is_refused(running: Serving) -> None:
    taken = running.cluster.url.rsplit(":", 1)[1]
    for where, word in (("nowhere:9", "9100"), ("127.0.0.1:0", "9100"), (f"127.0.0.1:{taken}", "choose")):
        with pytest.raises(ResplitError, match=word) as refusal, exposed(where, CollectorRegistry()):
            pass
        assert refusal.value.field == "metrics"
