"""Asking the orchestrator: deploy, remove, status, explain, plan; and waiting until a deployment serves."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from nats.aio.client import Client as Nats
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from pydantic import BaseModel

from resplit.defaults import CONNECT_TIMEOUT_S
from resplit.exchange import open_connection
from schemas import subjects
from schemas.base import DeploymentName
from schemas.codec import JSON, decode, decode_plain, encode
from schemas.control import (
    DeploymentStatus,
    DeployReply,
    DeployRequest,
    ExplainReply,
    ExplainRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
)
from schemas.errors import ErrorCode, ResplitError
from schemas.request import ErrorReply

ANSWER_S = 30.0
"""The orchestrator answers a deployment after it has planned it once."""
POLL_S = 0.1
GONE_AFTER = 100
"""Questions in a row that may go unanswered while an orchestrator restarts."""
HOPELESS = (ErrorCode.INFEASIBLE, ErrorCode.MODEL_TOO_LARGE, ErrorCode.UNKNOWN_MODEL, ErrorCode.UNSUPPORTED_MODEL)
"""Waiting does not help while the nodes stay as they are."""

Reply = TypeVar("Reply", bound=BaseModel)
Heard = Callable[[DeploymentStatus], None]


async def deploy(url: str, request: DeployRequest) -> DeployReply:
    """Ask for a deployment; raises `ResplitError` if it cannot fit or nobody answers."""
    return await _ask_at(url, "deploy", request, DeployReply)


async def remove(url: str, name: DeploymentName) -> RemoveReply:
    """End a deployment; raises `ResplitError(UNKNOWN_DEPLOYMENT)` if there is none of this name."""
    return await _ask_at(url, "remove", RemoveRequest(name=name), RemoveReply)


async def status(url: str) -> StatusReply:
    """What the orchestrator sees."""
    return await _ask_at(url, "status", None, StatusReply)


async def explain(url: str, name: DeploymentName | None) -> ExplainReply:
    """Why one deployment, or each, runs as it does; raises `ResplitError` if it is unknown or has no plan."""
    return await _ask_at(url, "explain", ExplainRequest(name=name), ExplainReply)


async def dry_run(url: str, name: DeploymentName) -> PlanReply:
    """What would be done about a deployment now. Nothing is changed."""
    return await _ask_at(url, "plan", PlanRequest(name=name), PlanReply)


async def deploy_and_wait(
    url: str, request: DeployRequest, timeout_s: float, on_progress: Heard = lambda _: None
) -> DeploymentStatus:
    """Deploy and wait until the deployment serves as asked on every node of its plan.

    Raises what the orchestrator reports if the deployment cannot be made, and `ResplitError(TIMEOUT)` with
    the last reason if it is not serving after `timeout_s`.
    """
    connection = await open_connection(url, "resplit-control", CONNECT_TIMEOUT_S, {})
    try:
        reply = await _ask(connection, "deploy", request, DeployReply)
        return await _until_serving(connection, reply, timeout_s, on_progress)
    finally:
        await connection.close()


async def _until_serving(
    connection: Nats, wanted: DeployReply, timeout_s: float, on_progress: Heard
) -> DeploymentStatus:
    last = "the orchestrator has not mentioned it yet"
    unanswered = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    reply = await _ask(connection, "status", None, StatusReply)
                    unanswered = 0
                except ResplitError as error:
                    unanswered += 1
                    if error.code is not ErrorCode.UNREACHABLE or unanswered > GONE_AFTER:
                        raise
                    reply = StatusReply(term=0, nodes=(), deployments=())
                for found in reply.deployments:
                    if found.name == wanted.deployment.name:
                        on_progress(found)
                        if _serves(found, wanted):
                            return found
                        last = _hurdle(found)
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        message = f"{wanted.deployment.name} does not serve after {timeout_s:g} s: {last}"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error


def _serves(found: DeploymentStatus, wanted: DeployReply) -> bool:
    as_wanted = found.state == "serving" and found.deployment == wanted.deployment and found.current is not None
    return as_wanted and found.current is not None and set(found.current.nodes) <= set(found.applied)


def _hurdle(found: DeploymentStatus) -> str:
    if found.error is not None:
        if found.error.code in HOPELESS and found.current is None and found.candidate is None:
            raise ResplitError(found.error.code, found.error.message, found.error.field)
        return f"{found.state}; {found.error.message} ({found.error.code})"
    return found.state if found.reason is None else f"{found.state}; {found.reason}"


async def _ask_at(url: str, verb: str, request: BaseModel | None, kind: type[Reply]) -> Reply:
    connection = await open_connection(url, "resplit-control", CONNECT_TIMEOUT_S, {})
    try:
        return await _ask(connection, verb, request, kind)
    finally:
        await connection.close()


async def _ask(connection: Nats, verb: str, request: BaseModel | None, kind: type[Reply]) -> Reply:
    data = b"" if request is None else encode(request)
    try:
        reply = await connection.request(subjects.control(verb), data, timeout=ANSWER_S)
    except NoRespondersError as error:
        raise ResplitError(ErrorCode.UNREACHABLE, "no orchestrator answers on this NATS server") from error
    except NatsTimeoutError as error:
        message = f"the orchestrator did not answer {verb!r} within {ANSWER_S:g} s"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error
    if "error" in decode_plain(reply.data, JSON, "reply"):
        refusal = decode(ErrorReply, reply.data, "reply").error
        raise ResplitError(refusal.code, refusal.message, refusal.field)
    return decode(kind, reply.data, "reply")
