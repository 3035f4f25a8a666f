"""What the deployments at one ingress have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel

from agent.cloud import Clouds
from agent.conductor import Conductor
from agent.finished import Finished
from agent.intake import Job
from agent.replies import ReplyTo
from agent.speeds import Speeds
from bus.audit import Trail
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.frame import Frame

if TYPE_CHECKING:
    from agent.served import Served


@dataclass(frozen=True)
class Desk:
    """What every deployment at one ingress shares: replies out, the audit trail, the clock, who is in flight."""

    node: NodeId
    say: Callable[[ReplyTo, BaseModel, RequestId | None], None]
    audit: Trail
    now: Callable[[], float]
    send: Callable[[NodeId, Frame], None]
    in_flight: dict[RequestId, tuple["Served", Job]]
    later: Callable[[float, Callable[[], None]], object]
    """`(seconds, call)`: call it then, on the event loop."""
    on_empty: Callable[[DeploymentName, int], None]
    """`(deployment, epoch)`: a draining epoch's last sequence has ended."""
    speeds: Speeds = field(default_factory=Speeds)
    """What nodes say of themselves."""
    conductor: Conductor | None = None
    """Asks the services of pipelines; None where none are served."""
    clouds: Clouds | None = None
    """Answer what the cluster cannot; None where the node knows none."""
    finished: Finished = field(default_factory=Finished)
    """What those that ended in text met."""

    def holds(self, job: Job) -> bool:
        """Whether it has not ended; another request may have its id since."""
        return self.in_flight.get(job.request_id, (None, None))[1] is job

    def drop(self, job: Job) -> None:
        """It has ended."""
        if self.holds(job):
            del self.in_flight[job.request_id]
