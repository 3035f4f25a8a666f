"""PURE: whether an audit trail is whole, from its envelopes alone, in one pass with one small state per life.

What is proved of each life of a writer, by `schemas.audit`: its events are those that it signed, in its order, none
missing between the first and the last that is there. That the last is the last is proved as far as somebody else says
so: a checkpoint of another writer that saw a later one, the life that came after, or a checkpoint that the verifier
kept. An end that nobody saw can be cut off unseen.

The order of events of different lives is the server's word. It is not judged, but for this: a key that was taken out
of the roster vouches for nothing behind the word of a writer that this roster was in force (`resplit.standing`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from resplit.standing import Reader, Seen, Trust
from schemas.audit import NOTHING_BEFORE, AuditEvent, Checkpoint, Head, Link, envelope_digest
from schemas.base import Digest, LifeId, LifeName, NodeId, NodeName, Sha256, Value
from schemas.errors import ResplitError
from schemas.merkle import Tree

EMPTY = Tree()
RECENT = 256
"""Hashes of a life that are kept, to know an event that comes twice and to check what others say of the latest."""
CLAIMS_MAX = 64
"""What others say of one life's events that are not there yet; what has the lowest numbers is forgotten first."""
FINDINGS_MAX = 1000
"""Findings that a verdict lists. All are counted."""


class Flaw(StrEnum):
    """What may be said against a trail."""

    UNREADABLE = "unreadable"
    BAD_SIGNATURE = "bad_signature"
    LATE = "late"
    """Signed with a key behind the word that it was taken out."""
    UNCHAINED = "unchained"
    """An event without a link behind events of its writer that have one."""
    GAP = "gap"
    BROKEN_LINK = "broken_link"
    FORK = "fork"
    OUT_OF_ORDER = "out_of_order"
    WRONG_CHECKPOINT = "wrong_checkpoint"
    NOT_AS_SEEN = "not_as_seen"
    """Another event stands where somebody else, or the verifier himself, saw one."""
    TRUNCATED = "truncated"
    LIFE_MISSING = "life_missing"

    LOST = "lost"
    REPEATED = "repeated"
    BEGINNING = "beginning"
    CUT_OFF = "cut_off"
    TWO_SUCCESSORS = "two_successors"
    EARLIER_RELEASE = "earlier_release"


DECLARED = frozenset(
    {Flaw.LOST, Flaw.REPEATED, Flaw.BEGINNING, Flaw.CUT_OFF, Flaw.TWO_SUCCESSORS, Flaw.EARLIER_RELEASE}
)
"""What the writers say themselves, or what an honest process that is killed leaves behind."""


@dataclass(frozen=True)
class Finding:
    """One thing that may be said against a trail, and where."""

    flaw: Flaw
    sentence: str
    writer: str = ""
    life: str = ""
    number: int = 0
    """0 where it is about no single event of a life."""

    @property
    def is_declared(self) -> bool:
        """Nothing was done to the trail, or nothing that could be known."""
        return self.flaw in DECLARED


class Kept(Value):
    """A checkpoint that a verifier keeps, to prove later that nothing before it has changed."""

    writer: NodeName
    life: LifeName
    count: int
    root: Sha256
    roster: int = 0
    """The version of the roster that the trail says to be in force by then."""


@dataclass(frozen=True)
class LifeFound:
    """What a trail has of one life."""

    writer: NodeId
    life: LifeId
    events: int
    lost: int
    checkpoints: int
    is_ended: bool
    """Its last event says that it is the last."""


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    findings: tuple[Finding, ...]
    """The first `FINDINGS_MAX`."""
    declared: int
    undeclared: int
    lives: tuple[LifeFound, ...]
    events: int
    kept: tuple[Kept, ...]
    """Where each whole life ends, to be held against the trail another time."""
    unchecked: int
    """Heads that others named of events too far back to be compared; the chain that goes on behind them vouches."""

    @property
    def is_sound(self) -> bool:
        """Nothing undeclared was found."""
        return self.undeclared == 0


@dataclass
class _Life:
    """One life as far as it was read."""

    writer: NodeId
    life: LifeId
    number: int = 0
    digest: Digest = NOTHING_BEFORE
    tree: Tree | None = EMPTY
    """None once an event is missing: what hangs on all of them can then not be checked."""
    recent: dict[int, Digest] = field(default_factory=dict)
    claims: dict[int, tuple[Digest, str]] = field(default_factory=dict)
    kept: dict[int, Digest] = field(default_factory=dict)
    events: int = 0
    lost: int = 0
    checkpoints: int = 0
    successors: int = 0
    is_ended: bool = False

    def found(self, flaw: Flaw, sentence: str, number: int = 0) -> Finding:
        return Finding(flaw, sentence, self.writer, self.life, number)


class Verifier:
    """Takes a trail envelope by envelope. Without `trust` signatures are not checked, and nothing is proved."""

    def __init__(self, trust: Trust | None, known_checkpoints: Iterable[Kept] = ()) -> None:
        self.last: AuditEvent | None = None
        """The event that was taken last, if it stands where it belongs."""
        known = tuple(known_checkpoints)
        self._reader = Reader(trust)
        self._known_roster = max((kept.roster for kept in known), default=0)
        self._lives: dict[tuple[NodeId, LifeId], _Life] = {}
        self._old: set[str] = set()
        self._chained: set[str] = set()
        self._events = 0
        self._unchecked = 0
        self._findings: list[Finding] = []
        self._counts = {True: 0, False: 0}
        for kept in known:
            self._life(kept.writer, kept.life).kept[kept.count] = kept.root

    def take(self, data: bytes) -> Sequence[Finding]:
        """What is to be said of the next envelope."""
        return self._counted(self._judge(data))

    def end(self) -> Sequence[Finding]:
        """What is to be said of the trail as a whole, once all of it was taken."""
        return self._counted(self._ends())

    def _counted(self, findings: Iterable[Finding]) -> Sequence[Finding]:
        found = list(findings)
        for finding in found:
            self._counts[finding.is_declared] += 1
        self._findings += found[: FINDINGS_MAX - len(self._findings)]
        return found

    def _judge(self, data: bytes) -> Iterator[Finding]:
        self._events += 1
        self.last = None
        try:
            seen = self._reader.read(data)
        except ResplitError as error:
            yield Finding(Flaw.UNREADABLE, f"event {self._events} of the trail cannot be read: {error.message}")
            return
        event = seen.event
        if seen.standing == "late":
            sentence = f"event {self._events} of the trail counts no more: {seen.why}"
            yield Finding(Flaw.LATE, sentence, event.source)
        elif seen.standing == "forged" or seen.signer != event.source:
            sentence = f"event {self._events} of the trail is not what a trusted {event.source!r} signed"
            yield Finding(Flaw.BAD_SIGNATURE, sentence, event.source)
        elif self._came_later(seen):
            sentence = f"event {self._events} of the trail was not there when checkpoints were kept"
            yield Finding(Flaw.LATE, f"{sentence}, and by then roster {seen.out} had taken its key out", event.source)
        elif event.chain is None:
            yield from self._unchained(seen)
        else:
            self._chained.add(event.source)
            yield from self._chain(event, event.chain, envelope_digest(data))

    def _came_later(self, seen: Seen) -> bool:
        """Whether an event of a key that was out when checkpoints were kept is behind them, wherever it stands."""
        link = seen.event.chain
        if link is None or seen.out is None or seen.out > self._known_roster:
            return False
        life = self._lives.get((seen.event.source, link.life))
        return life is None or link.number > max(life.kept, default=0)

    def verdict(self) -> Verdict:
        """What came of it so far."""
        lives = [life for life in self._lives.values() if life.number]
        found = tuple(LifeFound(_.writer, _.life, _.events, _.lost, _.checkpoints, _.is_ended) for _ in lives)
        kept = tuple(
            Kept(
                writer=life.writer,
                life=life.life,
                count=life.tree.count,
                root=life.tree.root,
                roster=self._reader.in_force,
            )
            for life in lives
            if life.tree is not None
        )
        counts = self._counts
        return Verdict(tuple(self._findings), counts[True], counts[False], found, self._events, kept, self._unchecked)

    def _ends(self) -> Iterator[Finding]:
        for life in self._lives.values():
            seen_by = [(number, who) for number, (_, who) in life.claims.items()]
            seen_by += [(count, "a checkpoint that was kept") for count in life.kept]
            number, who = max(seen_by, default=(0, ""))
            if number > life.number == 0:
                yield life.found(Flaw.LIFE_MISSING, f"{who} knows of {number} events of it, and none is there")
            elif number > life.number:
                sentence = f"it ends with event {life.number}, and {who} knows of event {number}"
                yield life.found(Flaw.TRUNCATED, sentence, life.number)
            elif life.successors and not life.is_ended:
                sentence = "another life follows, and this has no orderly end: its process was killed or lost the bus"
                yield life.found(Flaw.CUT_OFF, sentence, life.number)
            if life.successors > 1:
                sentence = f"{life.successors} lives name it as the one before; a process died before it could note"
                yield life.found(Flaw.TWO_SUCCESSORS, sentence)

    def _life(self, writer: NodeId, name: LifeId) -> _Life:
        return self._lives.setdefault((writer, name), _Life(writer, name))

    def _unchained(self, seen: Seen) -> Iterator[Finding]:
        source = seen.event.source
        if source not in self._chained:
            self.last = seen.event
        if source in self._chained:
            # An old event that was signed once may be put anywhere again; a chain would show it.
            sentence = f"event {self._events} of the trail has no place in a chain, and its writer has begun one"
            yield Finding(Flaw.UNCHAINED, sentence, source)
        elif source not in self._old:
            self._old.add(source)
            yield Finding(Flaw.EARLIER_RELEASE, "it begins with events that are in no chain", source)

    def _chain(self, event: AuditEvent, link: Link, digest: Digest) -> Iterator[Finding]:
        life = self._life(event.source, link.life)
        if link.number <= life.number:
            yield self._again(life, link, digest)
            return
        if link.number > life.number + 1:
            missing = f"events {life.number + 1} to {link.number - 1} are missing"
            yield life.found(Flaw.GAP, missing, link.number)
            life.tree = None
            life.claims = {number: claim for number, claim in life.claims.items() if number >= link.number}
        elif link.previous != life.digest:
            sentence = "the envelope before it is not the one that it names"
            yield life.found(Flaw.BROKEN_LINK, sentence, link.number)
        if link.lost:
            yield life.found(Flaw.LOST, f"{link.lost} events before it were never sent", link.number)
        if link.number == 1:
            yield from self._begins(life, link)
        if event.checkpoint is not None:
            yield from self._checkpoint(life, link, event.checkpoint)
        yield from self._accept(life, link, digest)
        self.last = event
        life.is_ended = event.checkpoint is not None and event.checkpoint.ends

    def _again(self, life: _Life, link: Link, digest: Digest) -> Finding:
        """An event whose number was passed already."""
        known = life.recent.get(link.number)
        if known == digest:
            return life.found(Flaw.REPEATED, "it is there twice, in the same bytes", link.number)
        if known is not None:
            return life.found(Flaw.FORK, "its writer signed two events with this number", link.number)
        sentence = f"it stands behind event {life.number} of its life"
        return life.found(Flaw.OUT_OF_ORDER, sentence, link.number)

    def _begins(self, life: _Life, link: Link) -> Iterator[Finding]:
        if link.before is None:
            yield life.found(Flaw.BEGINNING, "its writer knows of no life before it")
            return
        before = self._life(link.before.writer, link.before.life)
        before.successors += 1
        if link.before.writer != life.writer or before is life:
            sentence = f"it says that it follows a life of {link.before.writer!r}: {link.before.life}"
            yield life.found(Flaw.NOT_AS_SEEN, sentence, link.number)
        yield from self._claim(link.before, "the life after it")

    def _checkpoint(self, life: _Life, link: Link, checkpoint: Checkpoint) -> Iterator[Finding]:
        life.checkpoints += 1
        wrong_root = life.tree is not None and life.tree.root != checkpoint.root
        if checkpoint.count != link.number - 1 or wrong_root:
            sentence = f"its checkpoint is over {checkpoint.count} events that are not those before it"
            yield life.found(Flaw.WRONG_CHECKPOINT, sentence, link.number)
        for head in checkpoint.heads:
            yield from self._claim(head, life.writer)

    def _claim(self, head: Head, who: str) -> Iterator[Finding]:
        """`who` says that this envelope was in the trail."""
        life = self._life(head.writer, head.life)
        if head.number > life.number:
            known, _ = life.claims.setdefault(head.number, (head.digest, who))
            if len(life.claims) > CLAIMS_MAX:
                del life.claims[min(life.claims)]
        else:
            known = life.recent.get(head.number, head.digest)
            self._unchecked += head.number not in life.recent
        if known != head.digest:
            yield life.found(Flaw.NOT_AS_SEEN, f"{who} saw another event there", head.number)

    def _accept(self, life: _Life, link: Link, digest: Digest) -> Iterator[Finding]:
        life.number, life.digest = link.number, digest
        life.events += 1
        life.lost += link.lost
        life.recent[link.number] = digest
        if len(life.recent) > RECENT:
            del life.recent[next(iter(life.recent))]
        claimed, who = life.claims.pop(link.number, (digest, ""))
        if claimed != digest:
            yield life.found(Flaw.NOT_AS_SEEN, f"{who} saw another event there", link.number)
        if life.tree is not None:
            life.tree = life.tree.with_leaf(bytes.fromhex(digest))
            if life.kept.get(link.number, life.tree.root) != life.tree.root:
                sentence = "the events up to it are not those of the checkpoint that was kept"
                yield life.found(Flaw.NOT_AS_SEEN, sentence, link.number)


def verify(envelopes: Iterable[bytes], trust: Trust | None, known_checkpoints: Iterable[Kept] = ()) -> Verdict:
    """Hold a trail, in the order of its stream, against the chains of its writers and what they say of each other."""
    verifier = Verifier(trust, known_checkpoints)
    for data in envelopes:
        verifier.take(data)
    verifier.end()
    return verifier.verdict()
