"""PURE: when to give a NATS connection up, and when to try again. No clock and no chance but what is handed in."""

from dataclasses import dataclass, replace

SILENT_S = 5.0
"""A server that lives answers a ping every two seconds."""
ATTEMPT_S = 10.0
"""To find no name, to be let in by nobody and to wait until the next attempt takes less than this together."""


@dataclass(frozen=True)
class Seen:
    """A connection at one look."""

    connected: bool
    heard: int
    """Bytes that came so far."""
    attempts: int
    """To reconnect that were begun so far."""
    reading: bool
    """Somebody reads what comes."""
    trying: bool
    """Somebody tries to reconnect."""
    cut_off: bool = False
    """The server sees fewer than half of those that it saw on this connection."""


@dataclass(frozen=True)
class Watch:
    """What was seen last, and for how long nothing has come of it."""

    seen: Seen
    still_s: float = 0.0


def watched(watch: Watch, seen: Seen, awake_s: float) -> Watch:
    """After another look, `awake_s` later: time in which this process slept or was stopped says nothing of others."""
    still = (seen.connected, seen.heard, seen.attempts) == (watch.seen.connected, watch.seen.heard, watch.seen.attempts)
    return replace(watch, seen=seen, still_s=watch.still_s + awake_s if still else 0.0)


def fault(watch: Watch) -> str | None:
    """Why the connection neither serves nor will by itself; None while it does."""
    seen = watch.seen
    if seen.connected:
        if not seen.reading:
            return "nobody reads what comes"
        if seen.cut_off:
            return "the server is cut off from the others"
        return f"nothing came for {watch.still_s:.1f} s" if watch.still_s >= SILENT_S else None
    if not seen.trying:
        return "nobody tries to reconnect"
    return f"no attempt for {watch.still_s:.1f} s" if watch.still_s >= ATTEMPT_S else None


@dataclass(frozen=True)
class Backoff:
    """How soon to try again: up to `first_s` at first, twice as long each time, up to `most_s`."""

    first_s: float
    most_s: float


def backoff_s(attempt: int, draw: float, within: Backoff) -> float:
    """The wait before an attempt, the first being 0: the upper half of what there is, by `draw` from [0, 1), so that
    many who lost the same server do not come back at once, and none of them at once."""
    ceiling = min(within.most_s, within.first_s * 2.0 ** min(attempt, 32))
    return ceiling * (1.0 + draw) / 2.0
