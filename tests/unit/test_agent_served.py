"""What becomes of a deployment's requests at one ingress while its plan goes."""

import itertools
from typing import cast

from agent.attainment import Attainment
from agent.desk import Desk
from agent.generation import Generation
from agent.heirs import life_name
from agent.replies import ReplyTo
from agent.served import HANDOVER_S, Served
from agent.usage import Meter
from bus.journal import Journal
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.deployment import Settings, Stage
from schemas.frame import Activation
from schemas.request import TextRequest
from simulator.ingress import SILENT
from simulator.trail import Trail
from tests.nodes import plan_of
from tests.trigger_world import manifest

A, B = NodeId("n0"), NodeId("n1")
SETTINGS = Settings(context_tokens=64, max_sequences=4, chunk_tokens=8)
PLAN = plan_of(1, [Stage(node=A, first=0, last=1), Stage(node=B, first=2, last=3)], SETTINGS, 4)
TOKENS = (1, 2, 3)


def test_a_plan_is_not_closed_while_the_journal_stores_a_request_for_it() -> None:
    now, sent, emptied = [0.0], list[object](), list[int]()
    desk = Desk(
        A,
        lambda *_: None,
        Trail(lambda: now[0]),
        lambda: now[0],
        lambda _, frame: sent.append(frame),
        {},
        lambda *_: None,
        lambda _, epoch: emptied.append(epoch),
    )
    name = DeploymentName(PLAN.deployment)
    # Nothing is stored here: it is asked for nothing.
    journal, text = cast(Journal, None), SILENT
    served = Served(name, manifest(), text, desk, life_name(A, "boot", 1), journal, Attainment())
    served.follow(PLAN, (), itertools.count(1))
    request = TextRequest(token_ids=TOKENS, max_tokens=2)
    reply = cast(ReplyTo, None)
    job = Generation(
        RequestId("r"), request, reply, PLAN.model, TOKENS, 2, frozenset(), 0, Meter(0.0), text, deadline=None
    )
    desk.in_flight[job.request_id] = (served, job)
    served.accepting.add(job)

    served.follow(None, (PLAN,), itertools.count(1))  # the deployment was removed
    served.drain(PLAN.epoch)
    now[0] = HANDOVER_S
    served.leave_at = None  # and this node stops listening
    served.admit()
    assert emptied == []
    served.accepting.discard(job)
    served.queue.add(job)
    served.admit()
    assert any(isinstance(frame, Activation) for frame in sent), "it runs"
    assert (emptied, [run.draining for run in served.runs.values()]) == ([], [True])
