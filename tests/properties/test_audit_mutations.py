"""Whatever is done to a real audit trail is found, and nothing is said against one that nobody touched."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.identity import ORCHESTRATOR
from resplit.chain import Flaw, Verdict, verify
from tests.audit_trails import N0, N1, Recorded, record_trail
from tests.conftest import running_server

MUTATED = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """One trail for all: the mutations leave it as it is."""
    with running_server(tmp_path_factory.mktemp("nats")) as server, asyncio.Runner() as runner:
        yield runner.run(record_trail(server.url, tmp_path_factory.mktemp("keys")))


def judged(recorded: Recorded, envelopes: list[bytes], *, kept: bool = False) -> Verdict:
    return verify(envelopes, recorded.trust, recorded.kept if kept else ())


def flaws(verdict: Verdict) -> set[Flaw]:
    return {finding.flaw for finding in verdict.findings if not finding.is_declared}


def test_an_untouched_trail_is_sound_and_complete(recorded: Recorded) -> None:
    verdict = judged(recorded, list(recorded.envelopes), kept=True)
    assert verdict.is_sound
    assert {finding.flaw for finding in verdict.findings} == {Flaw.BEGINNING}
    assert [finding.writer for finding in verdict.findings] == [ORCHESTRATOR, N1, N0], (
        "n0's second life knows its first"
    )
    assert {life.writer: life.is_ended for life in verdict.lives} == {ORCHESTRATOR: True, N0: True, N1: True}
    assert sum(life.events for life in verdict.lives) == verdict.events == len(recorded.envelopes)
    assert verdict.kept == recorded.kept and len(verdict.kept) == 4
    assert verdict.unchecked == 0


@MUTATED
@given(data=st.data())
def test_an_event_that_is_left_out_is_found(recorded: Recorded, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(recorded.envelopes) - 1))
    envelopes = [*recorded.envelopes[:position], *recorded.envelopes[position + 1 :]]
    assert flaws(judged(recorded, envelopes, kept=True))
    places = recorded.lives()[recorded.link(position).life]
    if position != places[-1]:
        assert Flaw.GAP in flaws(judged(recorded, envelopes)), "without anything that was kept, too"


@MUTATED
@given(data=st.data())
def test_two_events_of_a_life_that_change_places_are_found(recorded: Recorded, data: st.DataObject) -> None:
    places = data.draw(st.sampled_from(list(recorded.lives().values())))
    first, second = sorted(data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True)))
    envelopes = list(recorded.envelopes)
    envelopes[first], envelopes[second] = envelopes[second], envelopes[first]
    assert Flaw.OUT_OF_ORDER in flaws(judged(recorded, envelopes))


@MUTATED
@given(data=st.data())
def test_an_event_with_one_byte_changed_is_found(recorded: Recorded, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(recorded.envelopes) - 1))
    envelope = bytearray(recorded.envelopes[position])
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))
    envelopes = list(recorded.envelopes)
    envelopes[position] = bytes(envelope)
    assert flaws(judged(recorded, envelopes)) & {Flaw.BAD_SIGNATURE, Flaw.UNREADABLE}


@MUTATED
@given(data=st.data())
def test_an_event_that_comes_again_is_noticed_and_tolerated(recorded: Recorded, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(recorded.envelopes) - 1))
    places = recorded.lives()[recorded.link(position).life]
    again = data.draw(st.sampled_from([place for place in places if place >= position]))
    envelopes = list(recorded.envelopes)
    envelopes.insert(again + 1, recorded.envelopes[position])
    verdict = judged(recorded, envelopes, kept=True)
    assert verdict.is_sound
    assert [f.number for f in verdict.findings if f.flaw is Flaw.REPEATED] == [recorded.link(position).number]


@MUTATED
@given(data=st.data())
def test_a_trail_that_is_cut_off_is_found_by_whoever_kept_a_checkpoint(recorded: Recorded, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(recorded.envelopes) - 1))
    assert flaws(judged(recorded, list(recorded.envelopes[:length]), kept=True)) & {Flaw.TRUNCATED, Flaw.LIFE_MISSING}


@MUTATED
@given(data=st.data())
def test_a_life_that_is_cut_off_is_found_by_what_others_saw_of_it(recorded: Recorded, data: st.DataObject) -> None:
    writer, life = data.draw(st.sampled_from([(N0, 0), (N0, 1), (N1, 0)]))
    places = recorded.life_of(writer, life)
    # The orchestrator knows that an event is stored when it hears the one after; the life after names the very last.
    seen = len(places) if (writer, life) == (N0, 0) else len(places) - 1
    kept = data.draw(st.integers(0, seen - 1))
    envelopes = [data for position, data in enumerate(recorded.envelopes) if position not in places[kept:]]
    assert flaws(judged(recorded, envelopes)) == {Flaw.TRUNCATED if kept else Flaw.LIFE_MISSING}


@MUTATED
@given(data=st.data())
def test_two_lives_in_one_are_found(recorded: Recorded, data: st.DataObject) -> None:
    first, second = recorded.life_of(N0, 0), recorded.life_of(N0, 1)
    until, since = data.draw(st.integers(1, len(first) - 1)), data.draw(st.integers(1, len(second) - 1))
    gone = {*first[until:], *second[:since]}
    envelopes = [data for position, data in enumerate(recorded.envelopes) if position not in gone]
    found = {(f.flaw, f.life) for f in judged(recorded, envelopes).findings}
    assert (Flaw.GAP, recorded.link(second[0]).life) in found
    if until < len(first) - 1:
        assert (Flaw.TRUNCATED, recorded.link(first[0]).life) in found


@MUTATED
@given(data=st.data())
def test_the_order_of_two_lives_among_each_other_is_not_judged(recorded: Recorded, data: st.DataObject) -> None:
    place: int = data.draw(st.integers(0, len(recorded.envelopes) - 2))
    envelopes = list(recorded.envelopes)
    envelopes[place], envelopes[place + 1] = envelopes[place + 1], envelopes[place]
    one_life = recorded.link(place).life == recorded.link(place + 1).life
    assert judged(recorded, envelopes, kept=True).is_sound is not one_life
