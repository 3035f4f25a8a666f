"""PURE: what round trips and transfers say of a link, and whom to measure next. Times in seconds of a steady clock."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from statistics import fmean, median

from schemas.base import NodeId

SAMPLES = 9
"""An estimate is over as many samples at most: one that went astray moves a median of nine by next to nothing."""
WINDOW_S = 180.0
"""Samples this much older than the newest one no longer count: the link may be another by now."""
EXPIRE_S = 900.0
"""An estimate whose newest sample is older than this is none."""
TRANSFER_BYTES = 64 << 10
"""Less says more about the round trip than about the rate."""
TRANSFER_SHARE_MIN = 0.1
"""No transfer counts as shorter than this share of the time to its acknowledgement: the round trip that is taken
off is known only so well, and the difference of two nearly equal times would be any rate at all."""
PIECE_S = 0.05
LATELY_S = 2.0
"""A link that was fast longer ago may be slow by now: a large piece would stand before everything else for seconds."""

VISITS_PER_MINUTE = 8
"""Connections that a node opens for the sake of measuring, in any minute."""
REVISIT_IN_PLAN_S = 120.0
REVISIT_SPARE_S = 600.0
"""A node in no plan looks again this seldom. Whom it never measured it measures at once, in either case."""
REVISIT_DOWN_FIRST_S, REVISIT_DOWN_S = 5.0, 60.0
"""A peer that is not reached is tried again after the former, then after twice as long each time, up to the latter: so
a mended edge is known after about as long again as it was broken."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement and when it was complete."""

    at_s: float
    value: float


@dataclass(frozen=True, slots=True)
class LinkHistory:
    """The latest samples of one link, oldest first: round trips in milliseconds, rates in bytes per second."""

    rtts: tuple[Sample, ...] = ()
    rates: tuple[Sample, ...] = ()
    acknowledged_s: float = 0.0
    """When the last transfer was acknowledged."""

    def round_trip(self, sent_s: float, back_s: float) -> "LinkHistory":
        """A message that nothing waited in front of was answered."""
        return replace(self, rtts=_with(self.rtts, Sample(back_s, 1e3 * max(0.0, back_s - sent_s))))

    def transfer(self, size_bytes: int, sent_s: float, acknowledged_s: float) -> "LinkHistory":
        """`size_bytes` left at `sent_s`, and the peer's word that all of it is there came at `acknowledged_s`.

        The transfer itself took at most the time in between less a round trip, and at most the time since the
        transfer before it was acknowledged, behind which it had to wait: the rate is over the smaller of the two.
        """
        elapsed_s = acknowledged_s - sent_s
        rtt_ms = self.rtt_ms(acknowledged_s)
        took_s = min(elapsed_s - (rtt_ms or 0.0) / 1e3, acknowledged_s - self.acknowledged_s)
        took_s = max(took_s, TRANSFER_SHARE_MIN * elapsed_s)
        if took_s <= 0:
            return self
        rates = _with(self.rates, Sample(acknowledged_s, size_bytes / took_s))
        return replace(self, rates=rates, acknowledged_s=acknowledged_s)

    def piece_bytes(self, now_s: float) -> int:
        """What to send at a time where other frames are to come through in between: what takes `PIECE_S` at the rate of
        the last transfer, but enough to measure the next one; no more than that where none was lately."""
        if not self.rates or now_s - self.rates[-1].at_s > LATELY_S:
            return TRANSFER_BYTES
        return max(TRANSFER_BYTES, int(PIECE_S * self.rates[-1].value))

    def rtt_ms(self, now_s: float, expire_s: float = EXPIRE_S) -> float | None:
        """The median round trip; None if there was none in the last `expire_s`."""
        values = _fresh(self.rtts, now_s, expire_s)
        return median(values) if values else None

    def jitter_ms(self, now_s: float, expire_s: float = EXPIRE_S) -> float | None:
        """The mean difference between successive round trips (RFC 3550, 6.4.1, over a window); None below two."""
        differences = [abs(b - a) for a, b in pairwise(_fresh(self.rtts, now_s, expire_s))]
        return fmean(differences) if differences else None

    def goodput_bytes_per_s(self, now_s: float, expire_s: float = EXPIRE_S) -> float | None:
        """The median rate of transfers; None if there was none in the last `expire_s`."""
        values = _fresh(self.rates, now_s, expire_s)
        return median(values) if values else None


@dataclass(frozen=True, slots=True)
class Visit:
    """When a node last opened a connection to a peer to measure it, and how often in vain since the peer answered."""

    at_s: float
    failures: int = 0

    def again(self, now_s: float, *, answered: bool) -> "Visit":
        """The next one."""
        return Visit(now_s, 0 if answered else self.failures + 1)


def next_visit(
    here: NodeId,
    candidates: Sequence[NodeId],
    down: Collection[NodeId],
    visits: Mapping[NodeId, Visit],
    lately: Sequence[float],
    now_s: float,
    *,
    in_plan: bool,
) -> NodeId | None:
    """Which of `candidates`, to whom `here` has no link, to measure now; None if nobody is due or enough was done.

    `down` are those whom no link reaches as far as `here` knows, `lately` the moments of its latest visits. Whoever was
    never measured comes first, then whoever was measured longest ago; among equals each node has an order of its own,
    so that not all of them call on the same peer at once.
    """
    if sum(now_s - at_s < 60.0 for at_s in lately) >= VISITS_PER_MINUTE:
        return None
    revisit_s = REVISIT_IN_PLAN_S if in_plan else REVISIT_SPARE_S
    due = []
    for peer in candidates:
        visit = visits.get(peer)
        if visit is None or now_s - visit.at_s >= (_retry_s(visit) if peer in down else revisit_s):
            due.append((-1.0 if visit is None else visit.at_s, sha256(f"{here} {peer}".encode()).digest(), peer))
    return min(due)[2] if due else None


def _retry_s(visit: Visit) -> float:
    return min(REVISIT_DOWN_S, REVISIT_DOWN_FIRST_S * 2.0 ** min(visit.failures, 32))


def _with(samples: tuple[Sample, ...], sample: Sample) -> tuple[Sample, ...]:
    return (*samples, sample)[-SAMPLES:]


def _fresh(samples: tuple[Sample, ...], now_s: float, expire_s: float) -> list[float]:
    if not samples or now_s - samples[-1].at_s > expire_s:
        return []
    return [sample.value for sample in samples if samples[-1].at_s - sample.at_s <= WINDOW_S]
