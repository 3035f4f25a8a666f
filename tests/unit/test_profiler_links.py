"""What samples say of a link, and whom a node measures next."""

from collections.abc import Mapping

import pytest

from profiler.links import (
    EXPIRE_S,
    LATELY_S,
    PIECE_S,
    REVISIT_DOWN_FIRST_S,
    REVISIT_DOWN_S,
    REVISIT_IN_PLAN_S,
    REVISIT_SPARE_S,
    TRANSFER_BYTES,
    VISITS_PER_MINUTE,
    WINDOW_S,
    LinkHistory,
    Visit,
    next_visit,
)
from schemas.base import NodeId

HERE = NodeId("here")
MB = 1_000_000


def pinged(*rtts_ms: float, start_s: float = 0.0) -> LinkHistory:
    """One ping a second, its answer after as many milliseconds."""
    history = LinkHistory()
    for i, rtt_ms in enumerate(rtts_ms):
        history = history.round_trip(start_s + i, start_s + i + rtt_ms / 1e3)
    return history


def test_a_link_that_was_never_measured_says_nothing() -> None:
    empty = LinkHistory()
    assert (empty.rtt_ms(0.0), empty.jitter_ms(0.0), empty.goodput_bytes_per_s(0.0)) == (None, None, None)
    assert pinged(4.0).jitter_ms(1.0) is None, "one round trip has no difference to another"


def test_a_piece_is_as_much_as_the_link_lately_carried_in_a_moment() -> None:
    empty = LinkHistory()
    assert empty.piece_bytes(0.0) == TRANSFER_BYTES, "enough to measure it"
    fast = empty.transfer(MB, 9.99, 10.0)
    assert fast.piece_bytes(10.1) == int(PIECE_S * fast.rates[-1].value) > TRANSFER_BYTES
    assert fast.piece_bytes(10.1 + LATELY_S) == TRANSFER_BYTES, "it may be slow by now"
    slow = fast.transfer(TRANSFER_BYTES, 11.0, 12.0)
    assert slow.piece_bytes(12.1) == TRANSFER_BYTES, "one transfer is enough to tell, whatever the median"


def test_the_round_trip_is_a_median_and_the_jitter_the_mean_difference_of_successive_ones() -> None:
    history = pinged(10, 14, 10, 500, 10)
    assert history.rtt_ms(5.0) == pytest.approx(10)
    assert history.jitter_ms(5.0) == pytest.approx((4 + 4 + 490 + 490) / 4)
    assert pinged(7, 7, 7).jitter_ms(3.0) == pytest.approx(0)


def test_a_change_shows_after_half_a_window_of_pings() -> None:
    assert pinged(*[1] * 9, *[20] * 5).rtt_ms(15.0) == pytest.approx(20)


def test_a_transfer_is_what_is_left_of_the_time_without_the_round_trip() -> None:
    history = pinged(100, 100).transfer(MB, 10.0, 10.6)
    assert history.goodput_bytes_per_s(11.0) == pytest.approx(2 * MB)


def test_a_transfer_that_waited_behind_another_is_timed_from_its_acknowledgement() -> None:
    one = pinged(100, 100).transfer(MB, 10.0, 10.6)
    behind = one.transfer(MB, 10.01, 11.1)  # 1.09 s after it left, but half a second after the other was there
    assert [sample.value for sample in behind.rates] == pytest.approx([2 * MB, 2 * MB])


def test_a_transfer_no_longer_than_the_round_trip_is_not_taken_for_infinitely_fast() -> None:
    history = pinged(100, 100).transfer(MB, 10.0, 10.1)
    assert history.goodput_bytes_per_s(11.0) == pytest.approx(MB / 0.01)
    assert LinkHistory().transfer(MB, 10.0, 10.0) == LinkHistory(), "no time at all says nothing"


def test_samples_much_older_than_the_newest_do_not_count_and_the_whole_expires() -> None:
    history = LinkHistory().transfer(MB, 0.0, 1.0).transfer(MB, 1.0, 2.0).transfer(MB, 499.5, 500.0)
    assert WINDOW_S < 500 - 2
    assert history.goodput_bytes_per_s(500.0) == pytest.approx(2 * MB)
    assert history.goodput_bytes_per_s(500.0 + EXPIRE_S) == pytest.approx(2 * MB)
    assert history.goodput_bytes_per_s(500.1 + EXPIRE_S) is None


def due(
    candidates: tuple[NodeId, ...],
    visits: Mapping[NodeId, Visit],
    now: float,
    *,
    down: bool = False,
    spare: bool = False,
) -> NodeId | None:
    known_down = candidates if down else ()
    return next_visit(HERE, candidates, known_down, visits, (), now, in_plan=not spare)


def test_whoever_was_never_measured_comes_first_then_whoever_was_longest_ago() -> None:
    old, older, new = NodeId("old"), NodeId("older"), NodeId("new")
    visits = {old: Visit(100.0), older: Visit(50.0)}
    now = 100.0 + REVISIT_IN_PLAN_S
    assert due((old, older, new), visits, now) == new
    assert due((old, older), visits, now) == older
    assert due((), visits, now) is None


def test_a_spare_node_looks_again_seldom() -> None:
    peer = NodeId("peer")
    seen = {peer: Visit(0.0)}
    assert due((peer,), seen, REVISIT_IN_PLAN_S) == peer
    assert due((peer,), seen, REVISIT_IN_PLAN_S, spare=True) is None
    assert due((peer,), seen, REVISIT_SPARE_S, spare=True) == peer


def test_whoever_is_down_is_tried_soon_and_then_less_and_less_often() -> None:
    """Also one that answered when it was last called on, and whose link was lost since."""
    peer = NodeId("peer")
    visit, tried, now = Visit(0.0), list[float](), 0.0
    while now < 400:
        if due((peer,), {peer: visit}, now, down=True, spare=True) == peer:
            tried.append(now - visit.at_s)
            visit = visit.again(now, answered=False)
        now += 0.5
    assert tried[:6] == [REVISIT_DOWN_FIRST_S, 10, 20, 40, REVISIT_DOWN_S, REVISIT_DOWN_S]
    assert visit.again(now, answered=True) == Visit(now)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("peers", [1, 5, 200])
def test_no_minute_has_more_visits_than_allowed(peers: int, answered: bool) -> None:
    candidates = tuple(NodeId(f"n{i}") for i in range(peers))
    visits: dict[NodeId, Visit] = {}
    times: list[float] = []
    for half_seconds in range(2 * 1800):
        now, down = half_seconds / 2, () if answered else candidates
        peer = next_visit(HERE, candidates, down, visits, times[-VISITS_PER_MINUTE:], now, in_plan=True)
        if peer is not None:
            visits[peer] = visits.get(peer, Visit(now)).again(now, answered=answered)
            times.append(now)
    assert len(visits) == peers, "within half an hour everybody had a turn"
    assert max(sum(start <= t < start + 60 for t in times) for start in times) <= VISITS_PER_MINUTE


def test_nodes_that_start_together_do_not_all_call_on_the_same_peer() -> None:
    candidates = tuple(NodeId(f"n{i}") for i in range(10))
    first = {next_visit(NodeId(f"h{i}"), candidates, (), {}, (), 0.0, in_plan=False) for i in range(20)}
    assert len(first) > 4
