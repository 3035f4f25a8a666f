"""Asks clouds over HTTP: bounded in time, in size and in number, and not at all for a while after one has failed.

On the event loop.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx2

from agent.clouds import Endpoint, KnownCloud
from agent.cloudwire import SHOWN, Ask, Said, can_say, nonsense, read_said
from agent.intake import Job
from bus.audit import Trail
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.deployment import Cloud
from schemas.errors import ErrorCode, ResplitError
from schemas.request import CloudUse, Request
from schemas.roster import Policy

ANSWER_BYTES_MAX = 8 << 20
CONNECT_S = 5.0
ATTEMPTS = 2
AGAIN_S = 0.25
AGAIN_MAX_S = 5.0
"""Between two attempts, unless the cloud says how long, and at most."""
RESTS_AFTER = 3
"""Requests that failed one after the other, after which none is put to it for a while:"""
RESTS_S = 1.0
RESTS_MAX_S = 60.0
"""at first, twice as long after each that fails then, at most."""
SMOOTHING = 0.2
REQUESTS_OWN = frozenset({400, 404, 413, 415, 422})
"""Statuses that say something against what was asked: another request may fare better, asking again would not."""
PASSING = frozenset({408, 429, 500, 502, 503, 504})


@dataclass
class _Known:
    """One endpoint, and how it fared."""

    endpoint: Endpoint
    client: httpx2.AsyncClient
    in_flight: int = 0
    failures: int = 0
    rests_until: float = -math.inf
    takes_s: float | None = None
    """Seconds to an answer, lately."""


class _FailedError(Exception):
    """An attempt came to nothing. It may be made again after `again_s` (None: never); `counts` says whether it says
    something against the endpoint."""

    def __init__(self, why: str, again_s: float | None = None, *, counts: bool = True) -> None:
        super().__init__(why)
        self.why, self.again_s, self.counts = why, again_s, counts


@dataclass(eq=False)
class Clouds:
    """The clouds that this node may ask."""

    known: Mapping[str, KnownCloud]
    audit: Trail
    now: Callable[[], float]
    policy: Callable[[], Policy]
    """The root's, as it is by now."""
    _open: dict[str, _Known] = field(default_factory=dict)

    def may_ask(self, deployment: DeploymentName, cloud: Cloud, request: Request, deadline_ms: float | None) -> bool:
        """Whether a request may be put to a cloud, which would take it now, and as far as was seen answer in time. What
        the root rules counts at once, before any plan follows it."""
        known = self._opened(cloud.name)
        if known is None or self.policy().rules_of(deployment) or not can_say(request, known.endpoint.protocol):
            return False
        if self.now() < known.rests_until or known.in_flight >= known.endpoint.in_flight:
            return False
        return deadline_ms is None or known.takes_s is None or 1e3 * known.takes_s <= deadline_ms

    async def ask(self, cloud: Cloud, ask: Ask, job: Job) -> tuple[Said, CloudUse]:
        """What a cloud answers. Raises CLOUD_FAILED with what went wrong."""
        known = self._opened(cloud.name)
        assert known is not None, "only what may be asked is asked"
        began = self.now()
        known.in_flight += 1
        try:
            async with asyncio.timeout(known.endpoint.timeout_s):
                said = await self._attempts(known, ask, job)
        except TimeoutError as error:
            self._failed(cloud.name, known, f"no answer within {known.endpoint.timeout_s:g} s")
            message = f"cloud {cloud.name!r} gave no answer within {known.endpoint.timeout_s:g} s"
            raise ResplitError(ErrorCode.CLOUD_FAILED, message) from error
        except _FailedError as failed:
            if failed.counts:
                self._failed(cloud.name, known, failed.why)
            raise ResplitError(ErrorCode.CLOUD_FAILED, f"cloud {cloud.name!r}: {failed.why}") from failed
        finally:
            known.in_flight -= 1
        took_s = self.now() - began
        self._answered(cloud.name, known, took_s)
        return said, CloudUse(
            name=cloud.name,
            model=cloud.model,
            total_ms=round(1e3 * took_s, 3),
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
            cost=cost(known.endpoint, said),
        )

    async def stop(self) -> None:
        """Close what is open."""
        for known in self._open.values():
            await known.client.aclose()

    def _opened(self, name: str) -> _Known | None:
        if name not in self._open and name in self.known:
            cloud = self.known[name]
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
            if cloud.key is not None:
                headers["Authorization"] = f"Bearer {cloud.key}"
            client = httpx2.AsyncClient(
                headers=headers,
                verify=cloud.tls or True,
                timeout=httpx2.Timeout(cloud.endpoint.timeout_s, connect=min(CONNECT_S, cloud.endpoint.timeout_s)),
                limits=httpx2.Limits(max_connections=cloud.endpoint.in_flight),
                follow_redirects=False,
            )
            self._open[name] = _Known(cloud.endpoint, client)
        return self._open.get(name)

    async def _attempts(self, known: _Known, ask: Ask, job: Job) -> Said:
        for left in reversed(range(ATTEMPTS)):
            try:
                return await self._attempt(known, ask, job)
            except _FailedError as failed:
                if not left or failed.again_s is None:
                    raise
                await asyncio.sleep(min(AGAIN_MAX_S, failed.again_s))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, known: _Known, ask: Ask, job: Job) -> Said:
        url = known.endpoint.url.rstrip("/") + ask.path
        try:
            async with known.client.stream("POST", url, content=ask.body) as response:
                data = await _bounded(response)
        except httpx2.HTTPError as error:
            raise _FailedError(f"it cannot be reached ({type(error).__name__}: {error})"[:SHOWN], AGAIN_S) from error
        if response.status_code == 200:
            try:
                return read_said(data, job)
            except ResplitError as error:
                raise _FailedError(error.message) from error
        shown = "".join(letter if letter.isprintable() else " " for letter in data[:SHOWN].decode("utf-8", "replace"))
        why = f"it answered {response.status_code}: {shown}"
        again_s = _retry_after(response) if response.status_code in PASSING else None
        raise _FailedError(why, again_s, counts=response.status_code not in REQUESTS_OWN)

    def _answered(self, name: str, known: _Known, took_s: float) -> None:
        known.takes_s = took_s if known.takes_s is None else known.takes_s + SMOOTHING * (took_s - known.takes_s)
        if known.failures >= RESTS_AFTER:
            self.audit.record(AuditKind.CLOUD_CHANGED, "a cloud answers again", cloud=name, up=True)
        known.failures = 0

    def _failed(self, name: str, known: _Known, why: str) -> None:
        known.failures += 1
        if known.failures < RESTS_AFTER:
            return
        rests_s = min(RESTS_MAX_S, RESTS_S * 2.0 ** min(16, known.failures - RESTS_AFTER))
        known.rests_until = self.now() + rests_s
        if known.failures == RESTS_AFTER:
            self.audit.record(
                AuditKind.CLOUD_CHANGED, "a cloud does not answer, and is left alone", cloud=name, up=False, why=why
            )


def cost(endpoint: Endpoint, said: Said) -> float:
    """PURE: what an answer costs by the endpoint's prices."""
    tokens = said.prompt_tokens * endpoint.price_prompt + said.completion_tokens * endpoint.price_output
    return endpoint.price_request + tokens / 1e6


async def _bounded(response: httpx2.Response) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > ANSWER_BYTES_MAX:
            raise _FailedError(nonsense(f"it has more than {ANSWER_BYTES_MAX} bytes").message)
    return bytes(data)


def _retry_after(response: httpx2.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", AGAIN_S)))
    except ValueError:
        return AGAIN_S
