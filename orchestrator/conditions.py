"""PURE: the nodes as they are for a deployment: at rest, over a longer time, under the strain of serving, and slow."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator.beliefs import believed, guessed, optimism_of, slower_times, timed
from orchestrator.fold import Snapshot
from orchestrator.risk import slowing
from orchestrator.strain import Strain
from profiler.host import Host
from schemas.base import Digest, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Placement, nodes_of
from schemas.manifest import Manifest
from schemas.plan import Plan


@dataclass(frozen=True)
class Conditions:
    """What plans are priced with. Every node that has reported is in each of the mappings."""

    current: Plan
    """The plan that runs while these conditions are seen."""
    heard: Mapping[NodeId, Capacity]
    rested: dict[NodeId, Host]
    """At rest, as of now."""
    calm: dict[NodeId, Host]
    """At rest, over a longer time."""
    strain: Strain
    optimism: float
    """See `beliefs.optimism_of`."""
    beside: frozenset[NodeId]
    """The nodes that share a machine with nodes of the current plan, which what they meet there may be."""

    def serving(self, chains: Placement) -> dict[NodeId, Host]:
        """The nodes of some routes under the strain of serving them."""
        return {node: self.rested[node].slower(self.strain.on(node, chains)) for node in nodes_of(chains)}

    def steady(self, chains: Placement) -> dict[NodeId, Host]:
        """The same as they are over a longer time."""
        those = guessed({node: self.calm[node] for node in nodes_of(chains)})
        return {node: host.slower(self.strain.on(node, chains)) for node, host in those.items()}

    def slowing(self, node: NodeId) -> float:
        """How many times slower than now a node would be were it slow (`risk.slowing`)."""
        beside = node in self.beside
        return slowing(self.strain.slowness(node, self.heard[node], self.current.chains, beside=beside))


def conditions_of(
    snapshot: Snapshot,
    manifest: Manifest,
    model: Digest,
    current: Plan,
    strain: Strain,
    optimism: float | None,
    now: datetime,
) -> Conditions:
    """The conditions of now; `optimism` is that of the last look."""
    heard = {name: node.capacity for name, node in snapshot.nodes.items()}
    in_use = {heard[NodeId(node)].machine for node in current.nodes} - {None}
    beside = frozenset(name for name, capacity in heard.items() if capacity.machine in in_use)
    rest = {
        name: strain.at_rest(name, capacity, current.chains, now, beside=name in beside)
        for name, capacity in heard.items()
    }
    times = {name: slower_times(node.times, rest[name]) for name, node in snapshot.nodes.items()}
    steadied = {name: slower_times(node.steady, rest[name]) for name, node in snapshot.nodes.items()}
    # A node that is to be drained is no candidate (`rooms`), and what it measured is as true as before.
    optimism = optimism_of(snapshot.present, times, manifest, model, optimism)

    def as_it_is(hosts: Mapping[NodeId, Host]) -> dict[NodeId, Host]:
        """A roofline knows nothing of what others compute there."""
        return {name: host if model in times[name] else host.slower(rest[name]) for name, host in hosts.items()}

    return Conditions(
        current,
        heard,
        as_it_is(believed(heard, times, manifest, model, optimism)),
        as_it_is(timed(heard, steadied, manifest, model, optimism)),
        strain,
        optimism,
        beside,
    )
