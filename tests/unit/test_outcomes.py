"""What requests met is held against what was predicted for them when they were admitted."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import e

import pytest

from agent.finished import TOLD_S, Finished
from agent.usage import Meter
from orchestrator.beliefs import STEADY_SPAN, believed, smoothed, steadied
from orchestrator.fold import CapacityReceived, DeploymentRemoved, Snapshot, fold
from orchestrator.outcomes import VIEWS
from orchestrator.rollout import Rollout
from profiler.compute import ROW, Times, times_of
from schemas.base import DeploymentName, NodeId
from schemas.capacity import FINISHED_MAX, BlockTime, Capacity, FinishedRequest
from schemas.deployment import Deployment, Settings, Stage
from schemas.plan import Plan, Route
from tests.unit.test_profiler_cost import MODEL, capacity, decoder

NAME = DeploymentName("chat")
NODE = NodeId("a")
START = datetime(2026, 1, 1, tzinfo=UTC)
PLAN = Plan(
    deployment=NAME,
    model=MODEL,
    epoch=1,
    previous=None,
    block_count=3,
    settings=Settings(),
    routes=(Route(index=0, source=NODE, stages=(Stage(node=NODE, first=0, last=2),), max_sequences=8),),
    reason="a test",
)


def met(number: int, **fields: float) -> FinishedRequest:
    base = {"number": number, "deployment": NAME, "epoch": 1, "route": 0, "prompt_tokens": 100, "output_tokens": 10}
    times = {"batch": 1, "started_ms": 4000, "ttft_ms": 300, "tpot_ms": 30}
    return FinishedRequest.model_validate({**base, **times, **fields})


class Orchestrator:
    """Folds heartbeats of one node that serves a plan."""

    def __init__(self) -> None:
        rollout = replace(Rollout(NAME, 1), current=PLAN)
        wish = Deployment(name=NAME, model=MODEL)
        self.snapshot = Snapshot(
            term=1, deployments={NAME: wish}, manifests={MODEL: decoder()}, rollouts={NAME: rollout}
        )
        self.beats = 0

    def hears(
        self, *finished: FinishedRequest, step_ms: float = 10.0, boot: str = "b", beat: int | None = None
    ) -> None:
        times = [BlockTime(model=MODEL, block=b, decode_ms=step_ms, prefill_ms_per_token=1) for b in range(3)]
        number = self.beats if beat is None else beat
        said = capacity(NODE, boot=boot, sequence=number, finished=finished, block_times=times)
        self.snapshot = fold(self.snapshot, CapacityReceived(said), START + timedelta(seconds=self.beats))
        self.beats += 1

    @property
    def terms(self) -> dict[str, float]:
        errors = self.snapshot.errors.get(NAME)
        return {} if errors is None else errors.terms

    @property
    def requests(self) -> int:
        return self.snapshot.errors[NAME].requests if NAME in self.snapshot.errors else 0


def test_a_request_that_met_what_was_predicted_has_no_error() -> None:
    one = Orchestrator()
    for _ in range(5):
        one.hears()
    assert one.terms == {}
    one.hears(met(0))
    assert one.terms == {"ttft_error": 0.0, "ttft_bias": 0.0, "tpot_error": 0.0, "tpot_bias": 0.0}
    one.hears(met(1, tpot_ms=40, ttft_ms=200))
    assert one.terms == pytest.approx({"ttft_error": 0.25, "ttft_bias": 0.25, "tpot_error": 0.125, "tpot_bias": -0.125})


def test_it_is_held_against_what_was_known_when_it_was_admitted_and_not_against_what_its_run_taught() -> None:
    one = Orchestrator()
    for _ in range(6):
        one.hears(step_ms=10)
    for _ in range(6):
        one.hears(step_ms=30)
    one.hears(met(0, started_ms=6500, tpot_ms=90), step_ms=30)
    assert one.terms["tpot_bias"] == pytest.approx(30 / 90 - 1, abs=1e-3)


def test_a_request_counts_once_however_often_it_is_told_and_anew_in_another_process() -> None:
    one = Orchestrator()
    one.hears()
    one.hears(met(0), met(1))
    one.hears(met(0), met(1), met(2))
    one.hears(met(3), beat=1)  # a heartbeat that was overtaken
    assert one.requests == 3
    one.hears(met(0), boot="c")
    assert one.requests == 4


def test_what_cannot_be_predicted_any_more_is_left_out() -> None:
    one = Orchestrator()
    one.hears()
    one.hears(met(0, epoch=7), met(1, route=3))
    assert one.requests == 0


def test_views_are_bounded() -> None:
    one = Orchestrator()
    for _ in range(4 * VIEWS):
        one.hears()
    assert len(one.snapshot.views) == VIEWS


def test_only_requests_that_ran_in_one_place_from_beginning_to_end_are_told_and_not_for_long() -> None:
    route = PLAN.routes[0]

    def ran(*epochs: int) -> Meter:
        meter = Meter(arrived=1.0, started=2.0)
        for epoch in epochs:
            meter.runs_on(epoch, route)
        meter.token(3.0)
        for sequences in (2, 4):
            meter.beside(sequences)
        meter.token(4.0)
        return meter

    finished = Finished()
    finished.add(NAME, ran(1, 2), 8, 2, now=5.0)
    finished.add(NAME, ran(1), 8, 2, now=5.0)
    [told] = finished.recent(5.0)
    assert (told.ttft_ms, told.tpot_ms, told.started_ms, told.batch) == (1000, 1000, 3000, 3)
    assert finished.recent(5.1 + TOLD_S) == ()
    for _ in range(3 * FINISHED_MAX):
        finished.add(NAME, ran(1), 8, 2, now=6.0)
    assert len(finished.recent(6.0)) == FINISHED_MAX


def test_a_block_that_a_node_never_ran_is_as_fast_as_its_like_there() -> None:
    model = decoder()
    layers = tuple(model.blocks[1].model_copy(update={"index": i}) for i in (1, 2))
    model = model.model_copy(update={"blocks": (model.blocks[0], *layers)})
    ran = BlockTime(model=MODEL, block=1, decode_ms=7, prefill_ms_per_token=3, decode_ms_per_row=2)
    node: Capacity = capacity("a", block_times=(ran,))
    seen = believed({NODE: node}, {NODE: times_of((ran,))}, model, MODEL, 1.0)
    assert seen[NODE].times.ms[:, 2].tolist() == seen[NODE].times.ms[:, 1].tolist() == [7, 2, 0, 0, 3]


def test_a_node_that_never_ran_the_model_is_believed_to_gain_from_company_what_others_gain() -> None:
    times = [
        BlockTime(model=MODEL, block=b, decode_ms=4, prefill_ms_per_token=3, decode_ms_per_row=1) for b in range(3)
    ]
    ran, idle = capacity("a", block_times=times), capacity("b")
    seen = believed({NODE: ran, NodeId("b"): idle}, {NODE: times_of(times)}, decoder(), MODEL, 1.0)
    guessed = seen[NodeId("b")].times
    assert guessed.ms[ROW, 1] == pytest.approx(guessed.decode_ms[1] / 4)


def test_every_term_of_a_block_time_is_smoothed() -> None:
    def said(scale: float) -> Times:
        terms = dict.fromkeys(("decode_ms", "prefill_ms", "prefill_ms_per_token", "decode_ms_per_row"), scale)
        return times_of((BlockTime(model=MODEL, block=0, decode_ms_per_context_token=scale, **terms),))

    [after] = smoothed(said(1.0), said(2.0), 3.0).values()
    assert after.ms[:, 0] == pytest.approx([2 - 1 / e] * 5)


def test_what_a_further_sequence_adds_is_never_far_behind_either() -> None:
    def said(slope: float | None, *blocks: int) -> Times:
        each = {"decode_ms": 5, "prefill_ms_per_token": 1, "decode_ms_per_row": slope}
        return times_of(BlockTime.model_validate({"model": MODEL, "block": block, **each}) for block in blocks)

    [calm] = steadied(said(1.0, 0), said(4.0, 0), 1.0, said(4.0, 0)).values()
    assert calm.ms[ROW, 0] == pytest.approx(4 / STEADY_SPAN)
    # What was not known before is as it is said now, block by block.
    assert smoothed(said(None, 0, 1), said(4.0, 1, 2), 1.0) == said(4.0, 1, 2)
    assert smoothed(said(4.0, 0), said(None, 0), 1.0) == said(None, 0)


def test_of_a_deployment_that_was_removed_nothing_is_kept() -> None:
    one = Orchestrator()
    one.hears()
    one.snapshot = fold(one.snapshot, DeploymentRemoved(NAME), START)
    one.hears(met(0))
    assert one.requests == 0
