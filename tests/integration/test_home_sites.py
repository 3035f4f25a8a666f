"""A site that is cut off goes on for its own deployments, and so does the hub; on return terms and epochs decide."""

import asyncio
import sys
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from bus.enrolment import renew
from bus.folders import ROSTER
from bus.following import publish_roster
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, load_identity, orchestrator_of
from bus.sealed_plans import seal_event
from bus.together import CLUSTER, OPERATOR
from resplit import control
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Home, NodeId
from schemas.control import StatusReply
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent, PlanPhase
from tests.integration.sites import H0, HUB_SUM, K0, K1, K2, KITCHEN, SETTINGS, SITE_SUM, asking, homes, sites

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


def nodes_of(seen: StatusReply, name: DeploymentName) -> set[str]:
    """Those of the plan in force, where every one of them has applied it."""
    found = next(one for one in seen.deployments if one.name == name)
    if found.state != "serving" or found.current is None or not set(found.current.nodes) <= set(found.applied):
        return set()
    return set(found.current.nodes)


def check_log(events: list[PlanEvent], home: Home) -> None:
    """That a log of plans only went forward: terms and revisions grow, and no epoch has two plans."""
    for before, after in pairwise(events):
        assert before.term <= after.term
        if before.deployment == after.deployment:
            assert (before.term, before.revision) < (after.term, after.revision)
            assert before.epoch <= after.epoch
    plans = {(plan.deployment, plan.epoch, plan.digest) for event in events for plan in event.plans}
    assert max(Counter((name, epoch) for name, epoch, _ in plans).values()) == 1
    assert {event.deployment for event in events} == {HUB_SUM if home is None else SITE_SUM}


@pytest.mark.parametrize("how", ["the link is cut", "the hub's server is killed"])
async def test_a_site_that_is_cut_off_decides_for_its_own_and_nothing_is_undone_when_it_is_back(
    tmp_path: Path, how: str
) -> None:
    async with sites(tmp_path) as both:
        seen = await both.until(KITCHEN, lambda seen: nodes_of(seen, SITE_SUM))
        assert nodes_of(seen, SITE_SUM) == {H0, K0}, "its route crosses the link"
        assert [one.name for one in seen.deployments] == [SITE_SUM]
        assert [one.name for one in (await control.status(both.operator(None))).deployments] == [HUB_SUM]
        assert seen.leader is not None
        term = seen.leader.term

        here, there, hubs = both.load(KITCHEN, SITE_SUM), both.load(None, SITE_SUM), both.load(None, HUB_SUM)
        async with asking(here, there, hubs):
            for load in (here, there, hubs):
                await load.rights(3)
            assert not (here.refused or there.refused or hubs.refused)
            before = await both.plans(KITCHEN)

            if how == "the link is cut":
                both.link.cut()
            else:
                await both.servers[None].kill()
            seen = await both.until(KITCHEN, lambda seen: H0 not in nodes_of(seen, SITE_SUM) != set())
            await here.rights(5)
            assert seen.leader is not None and seen.leader.term == term, "it kept its lease"
            current = seen.deployments[0].current
            assert current is not None
            ingress = NodeId(current.routes[0].source)
            await both.agents[ingress].kill()
            rest = {K0, K1, K2} - {ingress}
            await both.until(KITCHEN, lambda seen: nodes_of(seen, SITE_SUM) == rest)
            await here.rights(5)
            if how == "the link is cut":
                await hubs.rights(5)
            alone = await both.plans(KITCHEN)
            assert alone[: len(before)] == before and alone[-1].epoch > before[-1].epoch

            if how == "the link is cut":
                both.link.mend()
            else:
                await both.servers[None].start()
            for load in (there, hubs, here):
                await load.rights(5)
            seen = await both.until(None, lambda seen: rest <= {one.capacity.node for one in seen.nodes})
        assert not (here.wrong or there.wrong or hubs.wrong), "each ended right, or in one typed error"
        if how == "the link is cut":
            assert not hubs.refused, "nobody at the hub noticed, of its own deployments"
        after = await both.plans(KITCHEN)
        assert after[: len(alone)] == alone, "no plan of the site was undone"
        check_log(after, KITCHEN)
        check_log(await both.plans(None), None)
        for name, by, home in ((SITE_SUM, K2 if ingress != K2 else K1, KITCHEN), (HUB_SUM, H0, None)):
            async with asyncio.timeout(30):
                while await both.owed(name, by, home):  # noqa: ASYNC110 - the journal is asked
                    await asyncio.sleep(0.2)


async def test_who_steers_at_a_site_moves_nothing_of_the_hub(tmp_path: Path) -> None:
    """Not over the way that plans go, with keys that the cluster believes: agents refuse it, and say so."""
    async with sites(tmp_path) as both:
        for home, name in ((None, SITE_SUM), (KITCHEN, HUB_SUM)):
            with pytest.raises(ResplitError, match=f"{name}.* is at home at .*--url") as refused:
                await both.deploy(home, name)
            assert (refused.value.code, refused.value.field) == (ErrorCode.FORBIDDEN, "name")

        thief = orchestrator_of(KITCHEN)
        stolen = load_identity(both.keys / thief, thief)
        before = await both.plans(None)
        forged = PlanEvent(
            deployment=HUB_SUM,
            term=before[-1].term + 1,
            revision=1,
            phase=PlanPhase.RETIRE,
            reason="nobody asked for it",
            issued_at=datetime.now(UTC),
            lost=(H0,),
            answering=(H0,),
        )
        async with both.trail(None) as at_hub, both.trail(KITCHEN) as at_site, both.member(thief, KITCHEN) as client:
            await client.jetstream().publish(subjects.plan(HUB_SUM), seal_event(forged, stolen))
            async with asyncio.timeout(30):
                while True:
                    said = {
                        str(event.source): event.fields
                        for event in (*at_hub, *at_site)
                        if event.kind is AuditKind.EVENT_REJECTED
                    }
                    if said.keys() >= {H0, K0, K1, K2}:
                        break
                    await asyncio.sleep(0.1)
        assert {said[node]["code"] for node in (H0, K0, K1, K2)} == {"forbidden"}
        assert "steers the deployments of site 'kitchen'" in str(said[H0]["error"])
        load, sites_own = both.load(None, HUB_SUM), both.load(KITCHEN, SITE_SUM)
        async with asking(load, sites_own):
            await load.rights(3)
            await sites_own.rights(3)
        assert not (load.refused or load.wrong)
        assert await both.plans(None) == before


async def test_two_homes_that_plan_with_the_same_memory_do_not_both_get_it(tmp_path: Path) -> None:
    """Each sees room for its own caches, of 256 MiB, on h0: the node has it for one of them, and refuses the other at
    prepare, unless that one's planner has heard of it by then."""
    large = SETTINGS.model_copy(update={"max_sequences": 1024})
    async with homes(tmp_path, memory_bytes=600 << 20) as both:
        for home in (None, KITCHEN):
            await both.until(home, lambda seen: seen.nodes)
        ended = await asyncio.gather(
            both.deploy(None, HUB_SUM, settings=large),
            both.deploy(KITCHEN, SITE_SUM, settings=large),
            return_exceptions=True,
        )
        [refused] = [one for one in ended if one is not None]
        assert isinstance(refused, ResplitError) and refused.code is ErrorCode.MODEL_TOO_LARGE
        serving = [
            one.name
            for home in (None, KITCHEN)
            for one in (await control.status(both.operator(home))).deployments
            if one.current is not None
        ]
        assert len(serving) == 1


async def test_a_site_hears_of_the_hubs_rosters_and_each_home_has_a_trail_of_its_own(tmp_path: Path) -> None:
    async with homes(tmp_path) as both, both.trail(KITCHEN) as told, both.member(OPERATOR, None) as operator:
        await both.start(K0)
        cluster = both.keys / CLUSTER
        roster = renew(cluster, [load_holder(cluster / "root-0.key")], now=datetime.now(UTC))
        await publish_roster(operator.jetstream(), (cluster / ROSTER).read_bytes())
        taken = {orchestrator_of(KITCHEN), K0}
        async with asyncio.timeout(30):
            while True:
                await asyncio.sleep(0.1)
                if taken <= {event.source for event in told if event.fields.get("version") == roster.version}:
                    break
        for home, writers in ((None, {ORCHESTRATOR, H0}), (KITCHEN, taken)):
            async with both.member(OPERATOR, home) as client:
                info = await client.jetstream().stream_info(subjects.STREAM_AUDIT, subjects_filter=subjects.ALL_AUDIT)
            assert {subject.split(".")[3] for subject in info.state.subjects or {}} == writers
            command = ["audit", "verify", "--keys", str(both.keys / OPERATOR), "--url", both.url[home]]
            verify = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "resplit", *command, stdout=-1, stderr=-1
            )
            assert await verify.wait() == 0, await verify.communicate()
