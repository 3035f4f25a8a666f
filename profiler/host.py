"""PURE: a node as the cost model sees it, for one model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from profiler.compute import ModelTimes, Times, filled, roofline, times_of
from profiler.network import NO_LINKS, Links, links_by_peer
from profiler.sizes import sizes_of
from schemas.base import Digest, NodeId
from schemas.capacity import Capacity, LinkEstimate
from schemas.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Host:
    """What a node said of itself, and what every block of one model takes there."""

    capacity: Capacity
    times: ModelTimes
    measured: frozenset[int]
    """The blocks whose times are no roofline's."""
    links: Mapping[NodeId, LinkEstimate]
    """What it measured, by peer."""

    def slower(self, factor: float) -> "Host":
        """The same node if all blocks took `factor` times as long."""
        return self if factor == 1.0 else replace(self, times=self.times.slower(factor))


Hosts = Mapping[NodeId, Host]


def hosts_of(
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    digest: Digest,
    times: Mapping[NodeId, Times] | None = None,
) -> dict[NodeId, Host]:
    """Nodes as they say they are: the time of a block is the one its node measured, else its roofline's. `times` are
    what to take for measured, None for what the capacities say."""
    sizes, found = sizes_of(manifest), {}
    for name, capacity in capacities.items():
        said = times_of(capacity.block_times) if times is None else times.get(name, {})
        known = said.get(digest)
        measured = frozenset[int]() if known is None else frozenset(known.blocks)
        found[name] = Host(
            capacity, filled(known, roofline(capacity.provider, sizes)), measured, links_by_peer(capacity)
        )
    return found


def links_between(hosts: Hosts, nodes: tuple[NodeId, ...]) -> Links:
    """What these nodes measured, as far as they are among the hosts."""
    return {node: hosts[node].links if node in hosts else NO_LINKS for node in nodes}
