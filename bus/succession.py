"""Taking over from a life of an ingress that has ended: fence it, read what it owes, answer for that.

The order matters. A fence is an append to the life's own subject: what was stored before it counts, and nothing is
stored after it, so what is read then is final, even while the process that wrote it still runs.
"""

import asyncio
import logging
from dataclasses import dataclass

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bus.connection import jetstream_at
from bus.journal import ACK_S, RETRY_S, SupersededError, fenced_by
from bus.subject_log import Line, MovedError, NoRoomError, SubjectLog, UnsureError
from schemas import subjects
from schemas.base import DeploymentName, LifeId, home_of
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import Fence, LiveRequest, Stored, fold_journal, pack_record, unpack_records

FENCE_S = 10.0
"""Longer than a nats-server takes to come back."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Life:
    """A life that the journal knows. `messages`: how many it holds of it, fences among them."""

    deployment: DeploymentName
    life: LifeId
    messages: int
    fenced_by: LifeId | None


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a life owes, in order of acceptance, its requests as old as they were when it was fenced.

    `rejected`: what could not be read, a sentence each. Tokens behind it are not believed, and will come again.
    """

    deployment: DeploymentName
    life: LifeId
    requests: tuple[LiveRequest, ...]
    fenced_by: LifeId | None
    last: int
    """Sequence of the last message read."""
    rejected: tuple[str, ...] = ()


async def lives(client: Client, deployment: DeploymentName) -> tuple[Life, ...]:
    """Every life with messages in the journal, by name; raises `ResplitError(UNREACHABLE)`.

    A life of one message that is fenced was taken over completely; its fence is kept for as long as the stream keeps
    anything.
    """
    every = subjects.journal(deployment, LifeId("*"))
    try:
        js = jetstream_at(client, home_of(deployment))
        info = await js.stream_info(subjects.STREAM_JOURNAL, subjects_filter=every)
        found = []
        for subject, messages in sorted((info.state.subjects or {}).items()):
            life = LifeId(subject.rsplit(".", 1)[-1])
            newest = await _log_of(client, deployment, life).last()
            found.append(Life(deployment, life, messages, None if newest is None else fenced_by(newest.data)))
        return tuple(found)
    except (NatsError, TimeoutError, OSError, UnsureError) as error:
        raise _unreachable("the journal cannot be read") from error


async def read_life(client: Client, deployment: DeploymentName, life: LifeId) -> Recovered:
    """What a life owes now, fenced or not; raises `ResplitError(UNREACHABLE)`."""
    subject = _log_of(client, deployment, life)
    try:
        newest = await subject.last()
        lines = [] if newest is None else await subject.read(newest.sequence)
    except UnsureError as error:
        raise _unreachable(f"the journal of {life} cannot be read") from error
    return _recovered(deployment, life, lines)[0]


async def fence(
    client: Client, deployment: DeploymentName, life: LifeId, by: LifeId, over: LifeId | None = None
) -> Recovered:
    """Make `by` answer for what `life` owes, and say what that is. Done again by the same, it says the same.

    `over` is a successor that fenced `life` and died before it had taken everything over: fence that one first.
    Raises `SupersededError` naming who came first, and `ResplitError(UNREACHABLE)` after `FENCE_S`.
    """
    subject = _log_of(client, deployment, life)
    try:
        async with asyncio.timeout(FENCE_S):
            while True:
                try:
                    fenced_at = await _fence_once(subject, life, by, over)
                    lines = await subject.read(fenced_at)
                    if lines and lines[-1].sequence == fenced_at:
                        recovered, fences = _recovered(deployment, life, lines)
                        earlier = [other for other in fences if other != by]
                        if earlier and earlier[-1] != over:
                            raise SupersededError(life, earlier[-1])  # a stranger wrote behind its fence
                        return recovered
                except (UnsureError, NoRoomError) as error:
                    log.debug("a fence is not acknowledged: %s", error)
                except MovedError:
                    continue  # one more round was stored: look again, at once
                await asyncio.sleep(RETRY_S)
    except TimeoutError as error:
        raise _unreachable(f"{life} could not be fenced") from error
    finally:
        await subject.close()


async def release(client: Client, recovered: Recovered) -> None:
    """Once its requests are in the successor's journal: leave nothing of a fenced life but the fence.

    Raises `ResplitError(UNREACHABLE)`; whether it was done or not, it may be done again.
    """
    assert recovered.fenced_by is not None, "only what is fenced has been taken over"
    try:
        await _log_of(client, recovered.deployment, recovered.life).forget_before(recovered.last)
    except UnsureError as error:
        raise _unreachable(f"the journal of {recovered.life} cannot be removed") from error


async def _fence_once(subject: SubjectLog, life: LifeId, by: LifeId, over: LifeId | None) -> int:
    newest = await subject.last()
    if newest is not None and (first := fenced_by(newest.data)) is not None:
        if first == by:
            return newest.sequence
        if first != over:
            raise SupersededError(life, first)
    return await subject.append(pack_record(Fence(by)), 0 if newest is None else newest.sequence, ACK_S)


def _recovered(deployment: DeploymentName, life: LifeId, lines: list[Line]) -> tuple[Recovered, tuple[LifeId, ...]]:
    stored, rejected = [], []
    for line in lines:
        try:
            stored.append(Stored(line.sequence, line.at_s, unpack_records(line.data)))
        except ResplitError as error:
            rejected.append(f"message {line.sequence}: {error.message}")
    for sentence in rejected:
        log.error("the journal of %s: %s", life, sentence)
    folded = fold_journal(stored)
    requests = tuple(request.aged(lines[-1].at_s) for request in folded.live)
    fences = folded.fences
    last = lines[-1].sequence if lines else 0
    return Recovered(deployment, life, requests, fences[-1] if fences else None, last, tuple(rejected)), fences


def _log_of(client: Client, deployment: DeploymentName, life: LifeId) -> SubjectLog:
    return SubjectLog(client, subjects.STREAM_JOURNAL, subjects.journal(deployment, life), home_of(deployment))


def _unreachable(what: str) -> ResplitError:
    return ResplitError(ErrorCode.UNREACHABLE, f"{what}: JetStream does not answer; see to nats-server")
