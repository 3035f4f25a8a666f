"""What is owed follows from the journal, whatever of it is read twice, and however much of its beginning is gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.ledger import RUN_TOKENS_MAX, Ledger
from bus.sealed_requests import Seal
from schemas.base import DeploymentName, LifeId, RequestId
from schemas.errors import ResplitError
from schemas.journal import (
    MAX_NAME,
    Accepted,
    AcceptedRequest,
    Ended,
    Fence,
    Folded,
    Handle,
    Likely,
    Record,
    Run,
    SealedRun,
    Statement,
    Stored,
    Tokens,
    fold_journal,
    pack_record,
    unpack_records,
)

SEAL = Seal(bytes(32), DeploymentName("chat"), RequestId("r"))
counts = st.integers(0, (1 << 63) - 1)
names = st.text(max_size=20)
reals = st.floats(allow_nan=False, allow_infinity=False)
likelies: st.SearchStrategy[Likely] = st.tuples(
    st.none() | reals, st.lists(st.tuples(counts, reals), max_size=3).map(tuple)
)
requests = st.builds(
    AcceptedRequest,
    names.map(RequestId),
    names,
    st.binary(max_size=40),
    names,
    names,
    st.none() | counts,
    st.none() | counts,
    counts,
)
runs = st.lists(st.tuples(counts, likelies), max_size=4).flatmap(
    lambda pairs: st.builds(
        Run,
        counts,
        counts,
        st.just(tuple(token for token, _ in pairs)),
        st.sampled_from([(), tuple(likely for _, likely in pairs)]),
    )
)
sealed_runs = st.builds(SealedRun, counts, counts, counts, st.binary(min_size=1, max_size=20))
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Accepted, counts, requests),
    st.builds(Tokens, st.lists(runs | sealed_runs, max_size=3).map(tuple)),
    st.builds(Ended, st.lists(counts, max_size=3).map(tuple), names),
    st.builds(Statement, counts, st.lists(counts, max_size=3).map(tuple)),
    st.builds(Fence, names.map(LifeId)),
)


@given(st.lists(records, min_size=1, max_size=4))
def test_what_was_packed_is_read(message: list[Record]) -> None:
    assert unpack_records(b"".join(pack_record(record) for record in message)) == tuple(message)


@given(st.lists(records, min_size=1, max_size=3), st.data())
def test_bytes_with_a_flaw_are_a_message_or_a_typed_error(message: list[Record], data: st.DataObject) -> None:
    packed = b"".join(pack_record(record) for record in message)
    where = data.draw(st.integers(0, len(packed) - 1))
    wrong = packed[:where] + data.draw(st.binary(max_size=4)) + packed[where + data.draw(st.integers(0, 4)) :]
    try:
        read = unpack_records(wrong)
    except ResplitError as error:
        assert error.message.startswith("a malformed journal message")
    else:
        assert unpack_records(b"".join(pack_record(record) for record in read)) == read


@pytest.mark.parametrize(
    "record",
    [
        ["a", 1, "r", "m", "not bytes", "json", "inbox", None, None, 0],
        ["a", -1, "r", "m", b"", "json", "inbox", None, None, 0],
        ["a", 1, "r" * (MAX_NAME + 1), "m", b"", "json", "inbox", None, None, 0],
        ["t", [[1, 0, [True]]]],
        ["t", [[1, 0, [5, 6], [[-0.1, []]]]]],
        ["t", [[1, 0]]],
        ["e", [1.5], "output"],
        ["s", 3, [None]],
        ["f", 7],
        ["z"],
        {},
    ],
)
def test_a_record_that_is_none_is_refused(record: object) -> None:
    import msgpack  # noqa: PLC0415

    with pytest.raises(ResplitError, match="malformed"):
        unpack_records(msgpack.packb(record))


def test_half_a_message_and_none_are_refused() -> None:
    whole = pack_record(Ended((1, 2), "output"))
    for part in [*(whole[:n] for n in range(len(whole))), whole + whole[:3]]:
        with pytest.raises(ResplitError, match="malformed"):
            unpack_records(part)


@dataclass
class History:
    """A writer's messages, and what it owed after each: the model that the fold is held against."""

    messages: list[Stored] = field(default_factory=list)
    owed: list[dict[Handle, tuple[int, ...]]] = field(default_factory=list)
    statements: list[range] = field(default_factory=list)
    """Where in `messages` all was stated anew."""


@st.composite
def histories(draw: st.DrawFn) -> History:
    ledger, history, now = Ledger(), History(), 1000.0
    live: dict[Handle, tuple[int, ...]] = {}

    def store(*said: Record) -> None:
        history.messages.append(Stored(3 * len(history.messages) + 1, now, unpack_records(_packed(said))))
        history.owed.append(dict(live))

    for _ in range(draw(st.integers(1, 25))):
        now += draw(st.integers(0, 8))
        match draw(st.sampled_from(["accept", "tokens", "tokens", "tokens", "end", "state"])):
            case "accept":
                had = tuple(draw(st.lists(st.integers(0, 99), max_size=3)))
                request = AcceptedRequest(RequestId("r"), "m", b"{}", "", "i", age_ms=draw(st.integers(0, 9)) * 1000)
                handle = ledger.open(request, had, (), now, draw(st.sampled_from([None, SEAL])))
                live[handle] = had
                store(*ledger.statement_of(handle, now))
            case "tokens" if live:
                chosen = draw(st.lists(st.sampled_from(sorted(live)), unique=True))
                fresh = {handle: draw(st.integers(0, 99)) for handle in chosen}
                said = tuple(Run(handle, len(live[handle]), (token,)) for handle, token in fresh.items())
                live |= {handle: (*live[handle], token) for handle, token in fresh.items()}
                store(ledger.add(said))
            case "end" if live:
                gone = draw(st.sampled_from(sorted(live)))
                ledger.close([gone])
                del live[gone]
                store(Ended((gone,), "output"))
            case "state" if live:
                start = len(history.messages)
                for record in ledger.statement(now):
                    store(record)
                history.statements.append(range(start, len(history.messages)))
            case _:
                pass
    return history


@given(histories())
@settings(max_examples=200)
def test_any_beginning_of_a_journal_says_what_was_owed_then(history: History) -> None:
    for n, owed in enumerate(history.owed, 1):
        assert said(history.messages[:n]) == owed


@given(histories(), st.data())
@settings(max_examples=200)
def test_messages_read_again_change_nothing(history: History, data: st.DataObject) -> None:
    read = list(history.messages)
    for _ in range(data.draw(st.integers(0, 5))):
        if read:
            i = data.draw(st.integers(0, len(read) - 1))
            read.insert(data.draw(st.integers(i, len(read))), read[i])
    assert said(read) == (history.owed[-1] if history.owed else {})


@given(histories(), st.data())
@settings(max_examples=100)
def test_whatever_is_forgotten_before_a_statement_changes_nothing_after_it(
    history: History, data: st.DataObject
) -> None:
    """Also where the reader had begun: it then misses any part of what stood before the statement."""
    for statement in history.statements:
        gone = data.draw(st.sets(st.integers(0, max(0, statement.start - 1)), max_size=statement.start))
        kept = [message for i, message in enumerate(history.messages[: statement.start]) if i not in gone]
        for n in range(statement.stop, len(history.messages) + 1):
            assert said([*kept, *history.messages[statement.start : n]]) == history.owed[n - 1]


@given(histories(), st.data())
@settings(max_examples=100)
def test_nothing_counts_behind_a_fence(history: History, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(history.messages)))
    fence = Stored(1, 0.0, (Fence(LifeId("b")),))
    folded = fold_journal([*history.messages[:at], fence, *history.messages[at:]])
    assert tokens_of(folded) == (history.owed[at - 1] if at else {})
    assert folded.fences == (LifeId("b"),)


@given(histories(), st.integers(0, 100))
@settings(max_examples=100)
def test_a_request_is_as_old_however_often_it_was_stated(history: History, later: int) -> None:
    """Its age plus the time since: the same from the first statement as from the last."""
    if not history.messages:
        return
    end = history.messages[-1].at_s + later
    first: dict[Handle, int] = {}
    for message in history.messages:
        for record in message.records:
            if isinstance(record, Accepted):
                age = record.request.age_ms + round((end - message.at_s) * 1e3)
                assert first.setdefault(record.handle, age) == age
    for request in fold_journal(history.messages).live:
        assert request.aged(end).request.age_ms == first[request.handle]


def test_a_clock_that_went_back_makes_nobody_younger() -> None:
    request = fold_journal(
        [Stored(1, 50.0, (Accepted(1, AcceptedRequest(RequestId("r"), "m", b"", "", "", age_ms=7)),))]
    )
    assert request.live[0].aged(20.0) == request.live[0]


def test_of_two_tokens_under_one_index_the_first_counts_and_none_behind_a_gap() -> None:
    accepted = Accepted(1, AcceptedRequest(RequestId("r"), "m", b"", "", ""))
    said_of_it = [Run(1, 0, (5, 6)), Run(1, 1, (7, 8)), Run(1, 9, (9,)), Run(2, 0, (1,))]
    folded = fold_journal([Stored(1, 0.0, (accepted, Tokens(tuple(said_of_it))))])
    assert tokens_of(folded) == {1: (5, 6, 8)}


@pytest.mark.parametrize("seal", [None, SEAL])
def test_log_probabilities_stay_with_their_tokens_through_statements(seal: Seal | None) -> None:
    ledger = Ledger()
    tokens = tuple(range(RUN_TOKENS_MAX + 10))
    likely: tuple[Likely, ...] = tuple((-float(token), ((token, -0.5),)) for token in tokens)
    handle = ledger.open(AcceptedRequest(RequestId("r"), "m", b"", "", ""), tokens[:3], likely[:3], 0.0, seal)
    ledger.add([Run(handle, 3, tokens[3:], likely[3:])])
    (request,) = fold_journal([Stored(1, 0.0, (record,)) for record in ledger.statement(0.0)]).live
    assert (request.tokens == ()) is (seal is not None)
    request = SEAL.open_tokens(request)
    assert (request.tokens, request.likely, request.sealed) == (tokens, likely, ())


def test_tokens_of_a_sealed_request_are_never_said_in_the_open_not_even_once_it_has_ended() -> None:
    ledger = Ledger()
    handle = ledger.open(AcceptedRequest(RequestId("r"), "m", b"", "", ""), (), (), 0.0, SEAL)
    runs = [ledger.add([Run(handle, 0, (5,))])]
    ledger.close([handle])
    runs.append(ledger.add([Run(handle, 1, (6,))]))
    assert [type(run) for record in runs for run in record.runs] == [SealedRun]


def test_a_statement_that_is_read_while_requests_come_and_end_is_true_to_its_last_record() -> None:
    ledger = Ledger()
    request = AcceptedRequest(RequestId("r"), "m", b"", "", "")
    one, two, three = (ledger.open(request, (handle,), (), 0.0) for handle in (1, 2, 3))
    statement = ledger.statement(0.0)
    records = [next(statement), next(statement)]
    ledger.add([Run(one, 1, (11,)), Run(three, 1, (33,))])
    ledger.close([two])
    four = ledger.open(request, (), (), 0.0)
    meanwhile: list[Record] = [
        Tokens((Run(one, 1, (11,)), Run(three, 1, (33,)))),
        Ended((two,), "output"),
        Accepted(four, request),
    ]
    read = [*records, *statement, *meanwhile]
    assert said([Stored(1, 0.0, (record,)) for record in read]) == {one: (1, 11), three: (3, 33), four: ()}


def test_a_token_that_skips_an_index_is_a_defect() -> None:
    ledger = Ledger()
    handle = ledger.open(AcceptedRequest(RequestId("r"), "m", b"", "", ""), (), (), 0.0)
    with pytest.raises(AssertionError, match="token 1 after 0 tokens"):
        ledger.add([Run(handle, 1, (5,))])


def said(messages: Sequence[Stored]) -> dict[Handle, tuple[int, ...]]:
    """Live handles and their tokens."""
    return tokens_of(fold_journal(messages))


def tokens_of(folded: Folded) -> dict[Handle, tuple[int, ...]]:
    assert all(replace(one.request, age_ms=0).request_id == "r" for one in folded.live)
    return {one.handle: SEAL.open_tokens(one).tokens for one in folded.live}


def _packed(said: Sequence[Record]) -> bytes:
    return b"".join(pack_record(record) for record in said)
