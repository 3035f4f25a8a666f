"""The log of plans under several writers who all believe that they lead."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bus.connection import connect
from bus.enrolment import enrol
from bus.folders import ROSTER
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, load_identity
from bus.joining import join
from bus.streams import ensure_streams
from bus.together import CLUSTER, LIFETIME, make_members
from orchestrator.log import PlanLog
from orchestrator.rollout import Abandon, Proceed, Propose, Rollout, Withdraw, step
from schemas import subjects
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Settings, Stage
from schemas.envelope import LEADER_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership
from schemas.plan import Plan, PlanEvent, Route
from tests.sealed_events import whole

NAMES = [DeploymentName(name) for name in ("x", "y")]
NODE = NodeId("a")
WRITERS, OFFICES, EVENTS = 3, 5, 4


def plan_of(name: DeploymentName, epoch: int) -> Plan:
    route = Route(index=0, source=NODE, stages=(Stage(node=NODE, first=0, last=0),), max_sequences=1)
    return Plan(
        deployment=name,
        model=Digest("0" * 64),
        epoch=epoch,
        block_count=1,
        settings=Settings(),
        routes=(route,),
        reason="a test",
    )


def sleepy(dice: random.Random) -> Callable[[], Awaitable[None]]:
    """Between the look at the lease and the write, a process may sleep as long as it likes."""

    async def may_act() -> None:
        await asyncio.sleep(dice.choice((0, 0, 0.002, 0.01)))

    return may_act


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_writes_whenever_no_event_follows_one_of_a_higher_term(
    nats_url: str, tmp_path: Path, seed: int
) -> None:
    make_members(tmp_path, [NODE])
    identity = load_identity(tmp_path / NodeId("orchestrator"), NodeId("orchestrator"))
    client = await connect(nats_url, "writers")
    js = await ensure_streams(client)
    deposed = 0
    met = asyncio.Barrier(WRITERS)

    async def write(writer: int) -> None:
        nonlocal deposed
        dice = random.Random(seed * 100 + writer)
        for office in range(OFFICES):
            plans = PlanLog(js, identity, sleepy(dice))
            leadership, rollouts = await plans.take_office(
                NodeId(f"w{writer}"), datetime.now(UTC), lambda _, error: pytest.fail(str(error))
            )
            if office == 0:
                await met.wait()  # however busy the machine is, all but one write after another took office
            try:
                for _ in range(EVENTS):
                    name = dice.choice(NAMES)
                    rollout = rollouts.get(name, Rollout(name, leadership.term))
                    command = (
                        dice.choice((Abandon("a test"), Withdraw("a test")))
                        if rollout.candidate is not None
                        else Propose(plan_of(name, rollout.epoch + 1), hard=True)
                    )
                    taken = step(rollout, command, datetime.now(UTC))
                    if taken is not None:
                        await plans.append(taken[1])
                        rollouts[name] = taken[0]
            except ResplitError as error:
                assert error.code is ErrorCode.STALE_EPOCH
                deposed += 1

    try:
        await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
        seen: list[PlanEvent | Leadership] = []
        for sequence in range(1, (await js.stream_info(subjects.STREAM_PLANS)).state.last_seq + 1):
            message = await js.get_msg(subjects.STREAM_PLANS, sequence)
            data = message.data or b""
            if message.subject == subjects.LEADER:
                seen.append(open_envelope(data, Leadership, LEADER_TYPE, identity.orchestrators)[0])
            else:
                seen.append(whole(data, identity))
    finally:
        await client.close()
    assert [one.term for one in seen] == sorted(one.term for one in seen)
    offices = [one for one in seen if isinstance(one, Leadership)]
    assert [one.term for one in offices] == list(range(1, WRITERS * OFFICES + 1))
    assert deposed >= WRITERS - 1
    for name in NAMES:
        events = [one for one in seen if isinstance(one, PlanEvent) and one.deployment == name]
        assert [event.revision for event in events] == list(range(1, len(events) + 1)), "each built on the one before"
        proposed = [event.candidate.epoch for event in events if event.phase == "prepare" and event.candidate]
        assert len(set(proposed)) == len(proposed), "an epoch is used once"


async def test_a_log_that_was_purged_is_written_on(nats_url: str, tmp_path: Path) -> None:
    make_members(tmp_path, [NODE])
    identity = load_identity(tmp_path / NodeId("orchestrator"), NodeId("orchestrator"))
    client = await connect(nats_url, "writers")
    js = await ensure_streams(client)
    plans = PlanLog(js, identity)
    await plans.take_office(NODE, datetime.now(UTC), lambda _, error: pytest.fail(str(error)))
    await js.purge_stream(subjects.STREAM_PLANS)
    taken = step(Rollout(NAMES[0], term=1), Propose(plan_of(NAMES[0], 1)), datetime.now(UTC))
    assert taken is not None
    await plans.append(taken[1])
    assert (await js.stream_info(subjects.STREAM_PLANS)).state.messages == 1
    await client.close()


async def test_an_orchestrator_that_cannot_read_the_newest_plan_does_not_lead_until_it_is_sealed_anew(
    nats_url: str, tmp_path: Path
) -> None:
    make_members(tmp_path, [NODE])
    first = load_identity(tmp_path / ORCHESTRATOR, ORCHESTRATOR)
    client = await connect(nats_url, "writers")
    js = await ensure_streams(client)
    log, now = PlanLog(js, first), datetime.now(UTC)
    await log.take_office(NodeId("first"), now, lambda _, error: pytest.fail(str(error)))
    taken = step(Rollout(NAMES[0], term=1), Propose(plan_of(NAMES[0], 1)), now)
    assert taken is not None
    await log.append(taken[1])

    second, root = NodeId("second"), [load_holder(tmp_path / CLUSTER / "root-0.key")]
    join(
        enrol(tmp_path / CLUSTER, second, "orchestrator", None, LIFETIME, root, now=datetime.now(UTC)),
        tmp_path / second,
        datetime.now(UTC),
    )
    other = load_identity(tmp_path / second, second)
    with pytest.raises(ResplitError, match="is not sealed for 'second'") as caught:
        await PlanLog(js, other).take_office(second, now, lambda _, error: pytest.fail(str(error)))
    assert caught.value.code is ErrorCode.BAD_SIGNATURE

    await first.take_roster((tmp_path / CLUSTER / ROSTER).read_bytes())
    resealed = step(taken[0], Proceed(), now, roster=first.roster.version)
    assert resealed is not None
    await log.append(resealed[1])
    leadership, rollouts = await PlanLog(js, other).take_office(second, now, lambda _, error: pytest.fail(str(error)))
    assert (leadership.term, rollouts[NAMES[0]].plans) == (2, taken[0].plans)
    await client.close()
