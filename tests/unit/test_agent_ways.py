"""How a live sequence leaves a plan that drains: the cheapest way, and why."""

from dataclasses import replace

from agent.ways import Position, Way, choose

AT = Position(
    prompt_tokens=512,
    known_tokens=100,
    tokens_to_come=400,
    moved_bytes_per_token=10_000,
    chunk_tokens=128,
    step_s=0.02,
    new_step_s=0.02,
    prefill_s=0.2,
    replay_s=0.02,
    hold_s=0.05,
    bytes_per_s=1e8,
    beside=0,
    exact=True,
)


def test_caches_are_handed_over_where_the_link_carries_them() -> None:
    assert choose(AT).way is Way.HAND_OVER


def test_over_a_slow_link_a_short_sequence_is_computed_anew() -> None:
    slow = replace(AT, prompt_tokens=100, known_tokens=2, bytes_per_s=1e5)
    assert choose(slow).way is Way.RECOMPUTE
    assert choose(replace(slow, beside=20)).way is Way.STAY, "others are computed anew first"


def test_over_a_slow_link_a_long_sequence_finishes_where_it_is() -> None:
    assert choose(replace(AT, prompt_tokens=8192, known_tokens=800, bytes_per_s=1e6)).way is Way.STAY


def test_what_is_nearly_done_stays() -> None:
    assert choose(replace(AT, tokens_to_come=3)).way is Way.STAY


def test_a_route_that_became_slow_is_left_though_its_link_is_slow_too() -> None:
    alike = replace(AT, prompt_tokens=8, known_tokens=100, tokens_to_come=100, step_s=0.03, bytes_per_s=2e5)
    alike = replace(alike, chunk_tokens=8, prefill_s=0.01, replay_s=0.002, new_step_s=0.03)
    assert choose(replace(alike, replay_s=0.03)).way is Way.STAY
    slow = choose(replace(alike, new_step_s=0.002))
    assert slow.way is Way.RECOMPUTE
    assert slow.seconds[Way.STAY] > 100 * (0.03 - 0.002), "that is how far it would fall behind"
    assert choose(replace(alike, new_step_s=0.06)) == choose(alike), "a slower one is not left for its pace"


def test_where_nothing_moves_nothing_is_copied() -> None:
    found = choose(replace(AT, moved_bytes_per_token=0, bytes_per_s=1.0))
    assert found.way is Way.HAND_OVER
    assert found.seconds[Way.HAND_OVER] == AT.hold_s


def test_prefilling_what_came_out_is_cheaper_than_replaying_it() -> None:
    exact, fast = choose(AT), choose(replace(AT, exact=False))
    assert fast.seconds[Way.RECOMPUTE] == 5 * AT.prefill_s < exact.seconds[Way.RECOMPUTE]


def test_the_audit_names_the_way_and_what_each_would_have_cost() -> None:
    terms = choose(AT).terms
    assert terms["way"] == "hand-over"
    assert {name for name in terms if name.endswith("_ms")} == {"hand_over_ms", "recompute_ms", "stay_ms"}
    assert min(value for value in terms.values() if isinstance(value, float)) == terms["hand_over_ms"]
