"""What is written down of a run, where `bus.audit.AuditTrail` stands in production."""

from collections.abc import Callable
from dataclasses import dataclass, field

from schemas.audit import AuditKind
from schemas.base import DeploymentName, RequestId

KEPT_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Told:
    """One event, and when it was said in virtual seconds."""

    at_s: float
    kind: AuditKind
    message: str
    deployment: DeploymentName | None
    epoch: int | None
    request: RequestId | None
    fields: dict[str, str | int | float | bool | None]


@dataclass
class Trail:
    """The latest events, of everybody; requests' ends are counted, not kept."""

    now: Callable[[], float]
    told: list[Told] = field(default_factory=list)
    hear: Callable[[Told], None] | None = None

    def record(
        self,
        kind: AuditKind,
        message: str,
        *,
        deployment: DeploymentName | None = None,
        epoch: int | None = None,
        request: RequestId | None = None,
        then: Callable[[], None] | None = None,
        **fields: str | int | float | bool | None,
    ) -> None:
        if then is not None:
            then()
        if kind is AuditKind.REQUEST_ENDED or kind is AuditKind.REQUEST_REFUSED:
            return
        told = Told(self.now(), kind, message, deployment, epoch, request, fields)
        if len(self.told) < KEPT_MAX:
            self.told.append(told)
        if self.hear is not None:
            self.hear(told)
