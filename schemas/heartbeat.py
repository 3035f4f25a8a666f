"""PURE: what a heartbeat tells whom: all that its node is there, an ingress what runs for it, orchestrators all of it.

A node's `Capacity` says which blocks of what it runs, and who hears that of all nodes can put placements together. So
it travels in letters to those who need it, and in the open goes what every peer goes by.
"""

from collections.abc import Callable, Collection

from pydantic import AwareDatetime, Field

from schemas.base import DeploymentId, DeploymentName, NodeName, Value
from schemas.capacity import BlockTime, Capacity, HostedStage, LostPeer
from schemas.sealed import LETTERS_MAX, Letter


class Presence(Value):
    """What a heartbeat says to everybody: the node's process is there, and where. `sequence` grows with each one."""

    node: NodeName
    boot: str
    sequence: int = Field(ge=0)
    issued_at: AwareDatetime
    link: str | None = None
    lost_peers: tuple[LostPeer, ...] = Field(default=(), max_length=1024)


class Heartbeat(Presence):
    """A heartbeat as it is signed and travels."""

    letters: tuple[Letter, ...] = Field(default=(), max_length=LETTERS_MAX)
    """To the orchestrators all of it (`Capacity`), to each ingress its part (`Hosting`)."""


class Hosting(Value):
    """What an ingress is told by a node that runs stages for it, all of it of deployments that the ingress drives."""

    stages: tuple[HostedStage, ...] = ()
    block_times: tuple[BlockTime, ...] = ()
    contention: float | None = Field(default=None, ge=1, le=1e6)


def presence_of(said: "Capacity | Heartbeat") -> Presence:
    """What everybody may know."""
    return Presence(**{name: getattr(said, name) for name in Presence.model_fields})


def hosting_of(capacity: Capacity, deployments: Collection[DeploymentId] | None = None) -> Hosting:
    """What concerns these deployments; or all that run."""
    stages = tuple(stage for stage in capacity.stages if deployments is None or stage.deployment in deployments)
    models = {stage.model for stage in stages}
    times = tuple(time for time in capacity.block_times if time.model in models)
    return Hosting(stages=stages, block_times=times, contention=capacity.contention)


def hostings_of(
    capacity: Capacity, ingresses: Callable[[DeploymentName], Collection[NodeName]]
) -> tuple[tuple[Hosting, frozenset[NodeName]], ...]:
    """What each ingress is told, once for all that are told the same; `ingresses` are those of a deployment.

    The node itself is told nothing, and nobody is of what does not run there.
    """
    drives: dict[NodeName, set[DeploymentId]] = {}
    for stage in capacity.stages:
        for name in ingresses(DeploymentName(stage.deployment)):
            drives.setdefault(name, set()).add(stage.deployment)
    drives.pop(capacity.node, None)
    told: dict[frozenset[DeploymentId], set[NodeName]] = {}
    for name, deployments in drives.items():
        told.setdefault(frozenset(deployments), set()).add(name)
    by_names = sorted(told.items(), key=lambda entry: sorted(entry[0]))
    return tuple((hosting_of(capacity, deployments), frozenset(names)) for deployments, names in by_names)
