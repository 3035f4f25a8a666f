"""Frames from other nodes: unpacked, and let in where their sender is who would send them.

Every agent of the cluster can open a link to every other. One that has no part in a route could drive, end or falsify
what runs on it; so a frame counts from the node that the plan has before this one, or from an ingress, and no other.
"""

import logging
from collections.abc import Callable, Collection

from schemas.base import DeploymentName, NodeId
from schemas.errors import ResplitError
from schemas.frame import Activation, Adopt, Adopted, Cache, Close, Failure, Fetch, Frame, Result, Reuse
from schemas.framing import unpack
from schemas.section import SeenPlan

REFUSED_MAX = 100
"""Refusals that are written to the log in the life of a process: whoever sends rubbish must not fill it."""

log = logging.getLogger(__name__)


class Gate:
    """What comes to one node."""

    def __init__(
        self,
        plan_of: Callable[[DeploymentName, int], SeenPlan | None],
        ingresses: Callable[[DeploymentName], Collection[str]],
        route: Callable[[Frame], None],
    ) -> None:
        """`plan_of`: a plan of which this node was told last; `ingresses`: who may drive a deployment; `route` acts on
        what is let in."""
        self._plan_of = plan_of
        self._ingresses = ingresses
        self._route = route
        self._refused = 0

    def arrived(self, sender: NodeId, data: memoryview) -> None:
        """A frame came in from a peer; what is malformed, or not for it to send, is dropped with a word in the log."""
        try:
            frame = unpack(data)
            deployment = DeploymentName(frame.deployment)
            plan = self._plan_of(deployment, frame.epoch)
            if may_send(plan, self._ingresses(deployment), sender, frame):
                self._route(frame)
            elif plan is None:
                log.info("dropped a frame of a plan that is not here: %s, epoch %d", deployment, frame.epoch)
            else:
                self._refuse(sender, f"{type(frame).__name__} of {deployment}, epoch {frame.epoch}")
        except ResplitError as error:
            self._refuse(sender, error.message)
        except Exception:  # a frame of nonsense must not cost the link, and the frames behind it
            log.exception("dropped a frame from %s", sender)

    def _refuse(self, sender: NodeId, what: str) -> None:
        self._refused += 1
        if self._refused <= REFUSED_MAX:
            log.warning("dropped from %s: %s", sender, what)


def may_send(plan: SeenPlan | None, ingresses: Collection[str], sender: NodeId, frame: Frame) -> bool:
    """Whether `sender` is who would send `frame`, by what this node was told of its `plan`; None where it was told
    nothing of that, or no more. `ingresses` are those of the deployment. PURE."""
    match frame:
        case Fetch():
            return frame.node == sender  # who may have what is asked for is another question (`agent.guard`)
        case Adopt():
            return frame.ingress == sender and sender in ingresses
        case Activation() | Reuse():
            return _is_before(plan, sender, frame) or (
                frame.stage == 0 and frame.ingress == sender and sender in ingresses
            )
        case Close():
            return _is_before(plan, sender, frame) or sender in ingresses
        case Adopted() | Cache():
            return frame.node == sender  # whether it was asked is another question (`agent.handover`)
        case Result():
            return plan is not None and _ends(plan, sender, frame.route)
        case Failure():
            return plan is not None and sender in plan.nodes


def _ends(plan: SeenPlan, sender: NodeId, route: int) -> bool:
    last = [stage for (found, _), stage in plan.placed.items() if found == route and stage.last == plan.block_count - 1]
    return any(stage.node == sender for stage in last)


def _is_before(plan: SeenPlan | None, sender: NodeId, frame: Activation | Reuse | Close) -> bool:
    before = None if plan is None else plan.placed.get((frame.route, frame.stage - 1))
    return before is not None and before.node == sender
