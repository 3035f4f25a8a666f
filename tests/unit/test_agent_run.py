"""A route as its source runs it: what it tells the nodes when sequences end."""

import itertools

from agent.run import TENSOR_PATIENCE_S, RouteRun
from schemas.base import NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import Close, Frame, Result, Sampling
from tests.nodes import plan_of

STAGES = [Stage(node=NodeId("n0"), first=0, last=1), Stage(node=NodeId("n1"), first=2, last=3)]
SETTINGS = Settings(context_tokens=64, max_sequences=2, chunk_tokens=8)


def test_what_has_ended_or_never_came_is_closed_again_on_every_node_and_nothing_else() -> None:
    sent: list[tuple[NodeId, Frame]] = []
    plan = plan_of(1, STAGES, SETTINGS, 4)
    run = RouteRun(
        plan, plan.routes[0], NodeId("n0"), itertools.count(1), lambda node, frame: sent.append((node, frame))
    )
    ended = run.start((1, 2, 3), 64, Sampling(), (), 0.0)
    alive = run.start((4, 5, 6), 64, Sampling(), (), 0.0)
    assert ended is not None
    assert alive is not None
    run.end([ended.sequence])
    assert run.reserve(77, 64)
    run.give_up(77)
    sent.clear()
    run.close_again()
    assert sent == [(NodeId(node), Close("d", 1, 0, 1, (ended.sequence, 77))) for node in ("n0", "n1")]


def test_a_route_on_which_a_call_is_overdue_is_stalled_until_one_is_answered() -> None:
    plan = plan_of(1, STAGES, SETTINGS, 4)
    run = RouteRun(plan, plan.routes[0], NodeId("n0"), itertools.count(1), lambda *_: None)
    calls = [run.call({}, 0.0), run.call({}, 0.0)]
    seen = []
    for now in (TENSOR_PATIENCE_S, TENSOR_PATIENCE_S + 1):
        run.check(now)
        seen.append(run.driver.stalled)
    assert calls[0] is not None
    run.take(Result("d", 1, 0, (), ((calls[0], 0),), {}, "n0", ()), TENSOR_PATIENCE_S + 2)
    assert [*seen, run.driver.stalled] == [False, True, False]
