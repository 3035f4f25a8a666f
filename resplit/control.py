"""Asking the orchestrator for changes and for what is; and waiting until a change has come true."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Literal, TypeVar

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from pydantic import BaseModel

from bus.permissions import READING_VERBS
from resplit.access import Access
from schemas import subjects
from schemas.base import DeploymentName, NodeId
from schemas.codec import JSON, decode, decode_plain, encode
from schemas.control import (
    DeploymentStatus,
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    ExplainReply,
    ExplainRequest,
    PlaceRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
    TrustReply,
    TrustRequest,
    UndrainReply,
    UndrainRequest,
    WhereReply,
    WhereRequest,
)
from schemas.deployment import Chain, Placement
from schemas.errors import ErrorCode, ResplitError
from schemas.request import ErrorReply
from schemas.roster import Role

ANSWER_S = 30.0
"""The orchestrator answers a deployment after it has planned it once."""
ASK_AGAIN_S = 2.0
"""What only asks and changes nothing is asked anew after this: a leader that hangs gets the first question and
answers none, its successor the next."""
POLL_S = 0.1
GONE_AFTER = 100
"""Questions in a row that may go unanswered while an orchestrator restarts."""
HOPELESS = (ErrorCode.INFEASIBLE, ErrorCode.MODEL_TOO_LARGE, ErrorCode.UNKNOWN_MODEL, ErrorCode.UNSUPPORTED_MODEL)
"""Waiting does not help while the nodes stay as they are."""

READERS: tuple[Role, ...] = ("operator", "observer")
"""Who may ask what changes nothing."""

Reply = TypeVar("Reply", bound=BaseModel)
T = TypeVar("T")
Heard = Callable[[DeploymentStatus], None]


async def deploy(at: Access, request: DeployRequest) -> DeployReply:
    """Ask for a deployment; raises `ResplitError` if it cannot fit or nobody answers."""
    return await _ask_at(at, "deploy", request, DeployReply)


async def remove(at: Access, name: DeploymentName) -> RemoveReply:
    """End a deployment; raises `ResplitError(UNKNOWN_DEPLOYMENT)` if there is none of this name."""
    return await _ask_at(at, "remove", RemoveRequest(name=name), RemoveReply)


async def status(at: Access) -> StatusReply:
    """What the orchestrator sees."""
    return await _ask_at(at, "status", None, StatusReply)


async def status_on(connection: Nats, timeout_s: float = ANSWER_S) -> StatusReply:
    """What the orchestrator sees, over a connection that is there already."""
    return await _ask(connection, "status", None, StatusReply, timeout_s)


async def drain(at: Access, node: NodeId) -> DrainReply:
    """Use a node no more; raises `ResplitError` if it is unknown or if what runs on it cannot do without it."""
    return await _ask_at(at, "drain", DrainRequest(node=node), DrainReply)


async def undrain(at: Access, node: NodeId) -> UndrainReply:
    """Let plans use a node again."""
    return await _ask_at(at, "undrain", UndrainRequest(node=node), UndrainReply)


async def trust(at: Access, node: NodeId, trusted: bool) -> TrustReply:
    """Say whether a node may hold sensitive blocks; raises `ResplitError` if it is unknown, or if what is sensitive on
    it fits on no trusted node."""
    return await _ask_at(at, "trust", TrustRequest(node=node, trusted=trusted), TrustReply)


async def drain_and_wait(
    at: Access,
    node: NodeId,
    timeout_s: float,
    on_progress: Callable[[tuple[DeploymentStatus, ...]], None] = lambda _: None,
) -> None:
    """Drain a node and wait until no plan uses it: it is safe to switch off then.

    `on_progress` is told which deployments still use it. Raises what the orchestrator refuses with, and
    `ResplitError(TIMEOUT)` naming those deployments after `timeout_s`; the node stays drained then.
    """
    last = "the orchestrator has not said what uses it"

    def left(reply: StatusReply) -> Literal[True] | None:
        nonlocal last
        using = users(reply, node)
        on_progress(using)
        last = "; ".join(f"{found.name} uses it ({_hurdle(found)})" for found in using)
        return None if using or node not in reply.drained else True

    async with _connected(at, "operator") as connection:
        await _ask(connection, "drain", DrainRequest(node=node), DrainReply)
        try:
            async with asyncio.timeout(timeout_s):
                await _until(connection, left)
        except TimeoutError as error:
            message = f"{node} is still in use after {timeout_s:g} s: {last}"
            raise ResplitError(ErrorCode.TIMEOUT, message) from error


def users(reply: StatusReply, node: NodeId) -> tuple[DeploymentStatus, ...]:
    """The deployments of which a plan uses `node`: the current one, one being prepared, or one that drains."""
    return tuple(
        found
        for found in reply.deployments
        if any(plan is not None and node in plan.nodes for plan in (found.current, found.candidate, *found.draining))
    )


async def where(at: Access, model: str) -> WhereReply:
    """Where the blocks of a model are, and why."""
    return await _ask_at(at, "where", WhereRequest(model=model), WhereReply)


async def explain(at: Access, name: DeploymentName | None) -> ExplainReply:
    """Why one deployment, or each, runs as it does; raises `ResplitError` if it is unknown or has no plan."""
    return await _ask_at(at, "explain", ExplainRequest(name=name), ExplainReply)


async def explain_on(connection: Nats, name: DeploymentName | None, timeout_s: float = ANSWER_S) -> ExplainReply:
    """The same, over a connection that is there already."""
    return await _ask(connection, "explain", ExplainRequest(name=name), ExplainReply, timeout_s)


async def dry_run(at: Access, name: DeploymentName) -> PlanReply:
    """What would be done about a deployment now. Nothing is changed."""
    return await _ask_at(at, "plan", PlanRequest(name=name), PlanReply)


async def deploy_and_wait(
    at: Access, request: DeployRequest, timeout_s: float, on_progress: Heard = lambda _: None
) -> DeploymentStatus:
    """Deploy and wait until the deployment serves as asked on every node of its plan.

    Raises what the orchestrator reports if the deployment cannot be made, and `ResplitError(TIMEOUT)` with
    the last reason if it is not serving after `timeout_s`.
    """
    async with _connected(at, "operator") as connection:
        reply = await _ask(connection, "deploy", request, DeployReply)
        return await _until_serving(connection, reply, timeout_s, on_progress)


async def place(at: Access, name: DeploymentName, placement: Chain | Placement | None) -> DeployReply:
    """Lock a deployment to a placement, or (None) leave it to the planner; raises `ResplitError` if it cannot be."""
    return await _ask_at(at, "place", PlaceRequest(name=name, placement=placement), DeployReply)


async def place_and_wait(
    at: Access,
    name: DeploymentName,
    placement: Chain | Placement | None,
    timeout_s: float,
    on_progress: Heard = lambda _: None,
) -> DeploymentStatus:
    """Place, and wait as `deploy_and_wait` does."""
    async with _connected(at, "operator") as connection:
        reply = await _ask(connection, "place", PlaceRequest(name=name, placement=placement), DeployReply)
        return await _until_serving(connection, reply, timeout_s, on_progress)


async def _until_serving(
    connection: Nats, wanted: DeployReply, timeout_s: float, on_progress: Heard
) -> DeploymentStatus:
    last = "the orchestrator has not mentioned it yet"

    def served(reply: StatusReply) -> DeploymentStatus | None:
        nonlocal last
        for found in reply.deployments:
            if found.name == wanted.deployment.name:
                on_progress(found)
                if _serves(found, wanted):
                    return found
                last = _hurdle(found)
        return None

    try:
        async with asyncio.timeout(timeout_s):
            return await _until(connection, served)
    except TimeoutError as error:
        message = f"{wanted.deployment.name} does not serve after {timeout_s:g} s: {last}"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error


async def _until(connection: Nats, seen: Callable[[StatusReply], T | None]) -> T:
    """Look until `seen` finds something, past a restart of the orchestrator."""
    unanswered = 0
    while True:
        try:
            reply = await _ask(connection, "status", None, StatusReply)
        except ResplitError as error:
            unanswered += 1
            if error.code is not ErrorCode.UNREACHABLE or unanswered > GONE_AFTER:
                raise
        else:
            unanswered = 0
            if (found := seen(reply)) is not None:
                return found
        await asyncio.sleep(POLL_S)


def _serves(found: DeploymentStatus, wanted: DeployReply) -> bool:
    if found.state not in ("serving", "cold") or found.deployment != wanted.deployment:
        return False
    return found.current is not None and set(found.current.nodes) <= set(found.applied)


def _hurdle(found: DeploymentStatus) -> str:
    if found.error is not None:
        if found.error.code in HOPELESS and found.current is None and found.candidate is None:
            raise ResplitError(found.error.code, found.error.message, found.error.field)
        return f"{found.state}; {found.error.message} ({found.error.code})"
    return found.state if found.reason is None else f"{found.state}; {found.reason}"


async def _ask_at(at: Access, verb: str, request: BaseModel | None, kind: type[Reply]) -> Reply:
    async with _connected(at, *(READERS if verb in READING_VERBS else ("operator",))) as connection:
        return await _ask(connection, verb, request, kind)


@asynccontextmanager
async def _connected(at: Access, *roles: Role) -> AsyncIterator[Nats]:
    connection = await at.connect("resplit-control", *roles)
    try:
        yield connection
    finally:
        await connection.close()


async def _ask(
    connection: Nats, verb: str, request: BaseModel | None, kind: type[Reply], timeout_s: float = ANSWER_S
) -> Reply:
    data = b"" if request is None else encode(request)
    questions = math.ceil(timeout_s / ASK_AGAIN_S) if request is None else 1
    try:
        reply = await _reply(connection, verb, data, timeout_s, questions)
    except NoRespondersError as error:
        raise ResplitError(ErrorCode.UNREACHABLE, "no orchestrator answers on this NATS server") from error
    except NatsTimeoutError as error:
        message = f"the orchestrator did not answer {verb!r} within {timeout_s:g} s"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error
    return read_reply(reply.data, kind)


def read_reply(data: bytes, kind: type[Reply]) -> Reply:
    """What the orchestrator answers; raises the error that it answers with, or `ResplitError(INVALID_REQUEST)`."""
    plain = decode_plain(data, JSON, "reply")
    if isinstance(plain, dict) and "error" in plain:
        refusal = decode(ErrorReply, data, "reply").error
        raise ResplitError(refusal.code, refusal.message, refusal.field)
    return decode(kind, data, "reply")


async def _reply(connection: Nats, verb: str, data: bytes, timeout_s: float, questions: int) -> Msg:
    """The first reply, to whichever of the questions; raises what nats-py raises after `timeout_s` in all."""
    patience_s = timeout_s / questions
    for _ in range(questions - 1):
        with suppress(NatsTimeoutError):
            return await connection.request(subjects.control(verb), data, timeout=patience_s)
    return await connection.request(subjects.control(verb), data, timeout=patience_s)
