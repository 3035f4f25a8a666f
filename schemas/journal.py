"""The journal of accepted requests: its records, their bytes, and what they say is still owed. Pure.

Every life of an ingress has a subject of its own. A message there is one or more records, one msgpack array after
the other. A record may be repeated, and a writer states its live requests anew before it lets older messages go,
so what is owed follows from any suffix that holds such a statement (`fold_journal`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

import msgpack

from schemas.base import LifeId, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import check_announced
from schemas.request import MAX_REQUEST_BYTES

MAX_MESSAGE_BYTES = MAX_REQUEST_BYTES + (64 << 10)
"""The largest request there is, and what stands around it."""
MAX_ELEMENTS = 1 << 16
"""In one array of a record."""
MAX_NAME = 256
"""Characters of an id, an inbox, a content type."""

Handle = int
"""A request's number in one life of an ingress; never used twice."""
Likely = tuple[float | None, tuple[tuple[int, float], ...]]
"""A token's log-probability, and those of the likeliest tokens: `(logprob, ((token, logprob), ...))`."""


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """All that a successor needs to go on with a request, or to run it from the start."""

    request_id: RequestId
    model: str
    """Digest of the model whose tokens these will be."""
    data: bytes
    """The request as it came, sealed if it came so."""
    content_type: str
    inbox: str
    """Where its replies go; empty where nobody wants any."""
    seed: int | None = None
    """Of its random numbers, where it generates any: the client's, or the one that was drawn."""
    max_tokens: int | None = None
    """Where it generates: what it asked for, cut down to what the context left at acceptance."""
    age_ms: int = 0
    """From its arrival to this statement. No clock of one node is compared with that of another."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """`request` is owed an answer. Said again, it changes nothing but the age."""

    handle: Handle
    request: AcceptedRequest


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one request, the first at index `first`; `likely` has one for each, or none."""

    handle: Handle
    first: int
    tokens: tuple[int, ...]
    likely: tuple[Likely, ...] = ()


@dataclass(frozen=True, slots=True)
class SealedRun:
    """A run of `count` tokens of a request that came sealed; `box` opens for its readers (`bus.sealed_requests`)."""

    handle: Handle
    first: int
    count: int
    box: bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """One decode round, or what several rounds left waiting."""

    runs: tuple[Run | SealedRun, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """These requests are owed nothing more. `how`: `output`, or an error code."""

    handles: tuple[Handle, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Statement:
    """Of the requests up to handle `opened`, these are live, and all that they are owed is said once more from here.

    What stood before may be gone, or some of it: a reader that saw an acceptance may have missed the end.
    """

    opened: Handle
    live: tuple[Handle, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """From here on nothing counts in this life but further fences: `by` answers for its requests."""

    by: LifeId


Record = Accepted | Tokens | Ended | Statement | Fence


@dataclass(frozen=True, slots=True)
class Stored:
    """One message as the stream has it. `at_s`: when, in seconds of the server's clock."""

    sequence: int
    at_s: float
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that was accepted and has not ended, with its tokens from index 0.

    `likely` is as long as `tokens`, or empty. `sealed`: runs of tokens that have to be opened first, as they came.
    `stated_at_s`: when `request.age_ms` was true, by the server's clock.
    """

    handle: Handle
    request: AcceptedRequest
    stated_at_s: float
    tokens: tuple[int, ...] = ()
    likely: tuple[Likely, ...] = ()
    sealed: tuple[SealedRun, ...] = ()

    @property
    def tokens_stored(self) -> int:
        """How many tokens are stored of it; of sealed ones some may count more than once."""
        return len(self.tokens) + sum(run.count for run in self.sealed)

    def opened(self, runs: Iterable[Run]) -> "LiveRequest":
        """The same once `sealed` was opened to these runs, by the rules for those that never were sealed."""
        growing = _Growing(self.request, self.stated_at_s, list(self.tokens), list(self.likely))
        for run in runs:
            growing.add(run)
        return growing.frozen(self.handle)

    def aged(self, now_s: float) -> "LiveRequest":
        """The same at `now_s` of the server's clock."""
        older_ms = max(0, round((now_s - self.stated_at_s) * 1e3))
        request = replace(self.request, age_ms=self.request.age_ms + older_ms)
        return replace(self, request=request, stated_at_s=max(now_s, self.stated_at_s))


@dataclass(frozen=True, slots=True)
class Folded:
    """What the messages of one life say. `fences`: who fenced it, the first one first."""

    live: tuple[LiveRequest, ...]
    fences: tuple[LifeId, ...]


def fold_journal(messages: Iterable[Stored]) -> Folded:
    """What is owed after these messages of one life, in order of acceptance.

    Repeated messages change nothing, nor do those about requests whose acceptance is not among the messages. Of two
    tokens under one index the first counts; tokens behind a gap do not. Nothing counts after the first fence.
    """
    live: dict[Handle, _Growing] = {}
    ended: set[Handle] = set()
    fences: list[LifeId] = []
    for message in messages:
        for record in message.records:
            match record:
                case Fence(by):
                    fences.append(by)
                case _ if fences:
                    pass
                case Accepted(handle, request) if handle not in ended:
                    growing = live.setdefault(handle, _Growing(request, message.at_s))
                    growing.request, growing.at_s = request, message.at_s
                case Tokens(runs):
                    for run in runs:
                        if run.handle in live:
                            live[run.handle].add(run)
                case Ended(handles, _):
                    ended.update(handles)
                case Statement(opened, stated):
                    ended.update(handle for handle in live if handle <= opened and handle not in stated)
                case Accepted():
                    pass  # a repetition from before its end
                case _:
                    assert_never(record)
            for handle in ended.intersection(live):
                del live[handle]
    return Folded(tuple(growing.frozen(handle) for handle, growing in sorted(live.items())), tuple(fences))


@dataclass(slots=True)
class _Growing:
    request: AcceptedRequest
    at_s: float
    tokens: list[int] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)
    sealed: list[SealedRun] = field(default_factory=list)

    def add(self, run: Run | SealedRun) -> None:
        if isinstance(run, SealedRun):
            self.sealed.append(run)
            return
        known = len(self.tokens) - run.first
        if known >= 0:
            self.tokens += run.tokens[known:]
            self.likely += run.likely[known:]

    def frozen(self, handle: Handle) -> LiveRequest:
        tokens, likely, sealed = tuple(self.tokens), tuple(self.likely), tuple(self.sealed)
        return LiveRequest(handle, self.request, self.at_s, tokens, likely, sealed)


def pack_record(record: Record) -> bytes:
    """The bytes of one record; those of a message are its records' bytes, joined."""
    fields: Any
    match record:
        case Accepted(handle, r):
            fields = (
                "a",
                handle,
                r.request_id,
                r.model,
                r.data,
                r.content_type,
                r.inbox,
                r.seed,
                r.max_tokens,
                r.age_ms,
            )
        case Tokens(runs):
            fields = ("t", [_run_fields(run) for run in runs])
        case Ended(handles, how):
            fields = ("e", handles, how)
        case Statement(opened, live):
            fields = ("s", opened, live)
        case Fence(by):
            fields = ("f", by)
        case _:
            assert_never(record)
    packed: bytes = msgpack.packb(fields)
    return packed


def _run_fields(run: Run | SealedRun) -> tuple[Any, ...]:
    match run:
        case SealedRun(handle, first, count, box):
            return handle, first, count, box
        case Run(handle, first, tokens, ()):
            return handle, first, tokens
        case Run(handle, first, tokens, likely):
            return handle, first, tokens, likely


def unpack_records(data: bytes) -> tuple[Record, ...]:
    """Read one message; raises `ResplitError(INVALID_REQUEST)` on any flaw."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise _malformed(f"{len(data)} bytes long, at most {MAX_MESSAGE_BYTES} are read")
    unpacker = msgpack.Unpacker(
        use_list=False,
        max_buffer_size=MAX_MESSAGE_BYTES,
        max_array_len=MAX_ELEMENTS,
        max_map_len=0,
        max_ext_len=0,
        strict_map_key=True,
    )
    records: list[Record] = []
    try:
        check_announced(data)
        unpacker.feed(data)
        while not records or unpacker.tell() < len(data):
            records.append(_read_record(unpacker.unpack()))
    except ResplitError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _malformed(str(error) or type(error).__name__) from error
    return tuple(records)


def _read_record(fields: Any) -> Record:
    match fields:
        case ("a", handle, request_id, model, bytes(data), content_type, inbox, seed, max_tokens, age_ms):
            request = AcceptedRequest(
                RequestId(_name(request_id)),
                _name(model),
                data,
                _name(content_type),
                _name(inbox),
                None if seed is None else _count(seed),
                None if max_tokens is None else _count(max_tokens),
                _count(age_ms),
            )
            return Accepted(_count(handle), request)
        case ("t", tuple(runs)):
            return Tokens(tuple(_read_run(*run) for run in runs))
        case ("e", tuple(handles), how):
            return Ended(_counts(handles), _name(how))
        case ("s", opened, tuple(live)):
            return Statement(_count(opened), _counts(live))
        case ("f", by):
            return Fence(LifeId(_name(by)))
        case _:
            raise _malformed("a record of no known kind")


def _read_run(handle: Any, first: Any, tokens: Any, likely: Any = ()) -> Run | SealedRun:
    if isinstance(likely, bytes):
        return SealedRun(_count(handle), _count(first), _count(tokens), likely)
    if likely and len(likely) != len(tokens):
        raise _malformed(f"{len(likely)} log-probabilities for {len(tokens)} tokens")
    read = tuple(
        (None if logprob is None else float(logprob), tuple((_count(token), float(p)) for token, p in top))
        for logprob, top in likely
    )
    return Run(_count(handle), _count(first), _counts(tokens), read)


def _counts(numbers: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_count(number) for number in numbers)


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise _malformed(f"{str(number)[:40]!r} where a count belongs")
    return number


def _name(text: Any) -> str:
    if not isinstance(text, str) or len(text) > MAX_NAME:
        raise _malformed("something that is not a short text where a name belongs")
    return text


def _malformed(why: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, f"a malformed journal message: {why}")
