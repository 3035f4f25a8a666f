"""What `status --watch` draws of one look, and what it does while nobody answers."""

from datetime import UTC, datetime

import pytest
from rich.console import Console

from resplit.live import Look, colours_of, frame, looks, strip
from schemas.base import NodeId
from schemas.control import StatusReply
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership
from tests.unit.test_diagnosis import A, B, C, chat, node

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def drawn(look: Look) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(frame(look))
    return capture.get()


def reply(*deployments: object, **fields: object) -> StatusReply:
    known = {"term": 2, "nodes": (node(A, B), node(B, A), node(C, age_s=40, lost=True)), "deployments": deployments}
    return StatusReply.model_validate({**known, **fields})


def test_every_block_is_a_cell_in_the_colour_of_its_node() -> None:
    current = chat().current
    assert current is not None
    colours = colours_of(reply(chat()))
    text = strip(current.routes[0].stages, colours)
    assert text.plain == "████"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, 2, colours["a"]), (2, 4, colours["b"])]
    assert colours["a"] != colours["b"]


def test_a_look_shows_nodes_plans_and_what_is_predicted() -> None:
    current = chat().current
    assert current is not None
    moving = chat(
        state="changing",
        candidate=current.model_copy(update={"epoch": 4}),
        draining=(current.model_copy(update={"epoch": 2}),),
        ready=(A,),
        estimate={"tpot_ms": 12.34, "ttft_ms": 56.78},
        reason="to be drained: b",
    )
    text = drawn(Look(NOW, reply(moving, drained=(B, NodeId("x")))))
    for words in (
        "serves 3",
        "prepares 4",
        "1 of 2 ready",
        "drains 2",
        "a:0-1 > b:2-3",
        "TPOT 12.3 ms",
        "TTFT 56.8 ms",
    ):
        assert words in text
    for words in ("TTFT 56.8 ms", "up, drained", "lost", "b 0.4 ms", "drained and not here: x", "to be drained: b"):
        assert words in text


def test_a_deployment_without_a_plan_and_none_at_all_are_shown() -> None:
    text = drawn(Look(NOW, reply(chat(state="waiting", current=None, reason="no node is here"))))
    assert "waiting" in text and "no node is here" in text
    assert "nothing is deployed" in drawn(Look(NOW, reply()))


@pytest.mark.parametrize(("standbys", "others"), [(("o-2", "o-3"), "standing by: o-2, o-3"), ((), "nobody stands by")])
def test_a_look_begins_with_who_leads_and_who_would(standbys: tuple[str, ...], others: str) -> None:
    leader = Leadership(leader=NodeId("o-1"), term=7, since=NOW)
    first = drawn(Look(NOW, reply(leader=leader, standbys=standbys))).splitlines()[0]
    assert "o-1 leads in term 7 since" in first and others in first


async def test_an_orchestrator_that_falls_silent_leaves_what_was_seen_last() -> None:
    answers: list[StatusReply | ResplitError] = [
        reply(chat()),
        ResplitError(ErrorCode.TIMEOUT, "silent"),
        reply(),
        ResplitError(ErrorCode.UNREACHABLE, "gone"),
    ]

    async def ask() -> StatusReply:
        found = answers.pop(0)
        if isinstance(found, ResplitError):
            raise found
        return found

    seen = []
    async for look in looks(ask, 0):
        seen.append((len(look.reply.deployments), look.silence))
        if len(seen) == 4:
            break
    assert seen == [(1, None), (1, "silent"), (0, None), (0, "gone")]
    assert "no answer: silent" in drawn(Look(NOW, reply(), "silent"))
    answers.append(ResplitError(ErrorCode.UNREACHABLE, "never there"))
    with pytest.raises(ResplitError, match="never there"):
        await anext(looks(ask, 0))


def test_a_look_says_how_far_predictions_were_off() -> None:
    served = chat(
        estimate={"tpot_ms": 12.34, "ttft_ms": 56.78}, prediction_error={"tpot_error": 0.06, "tpot_bias": 0.0}
    )
    text = drawn(Look(NOW, reply(served)))
    assert "TPOT 12.3 ms predicted (6% off lately)" in text
    assert "TTFT 56.8 ms predicted (" not in text
