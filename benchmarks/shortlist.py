"""What it costs to look for plans among some of very many nodes: `python -m benchmarks.shortlist [--quick]`.

Random clusters of sites in a square: nodes differ in speed and memory (10 to 40 % of the model), links in length, and
each node has measured some links, of its own site and others, 5 % off. A plan is made among the nodes of the shortlist
(`orchestrator.shortlist`) and, where that can be waited for, among all; each is priced by what its links truly are,
and compared with the best plan of one who knows all links. CPU seconds of one call on one thread.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from benchmarks.table import Row, report
from orchestrator.fold import CapacityReceived, DeploymentWritten, ManifestKnown, Snapshot, fold
from orchestrator.planner import Proposal, make_plan
from orchestrator.rooms import believed_rooms
from orchestrator.shortlist import planned_anew
from profiler.forecast import forecast
from profiler.host import hosts_of
from profiler.memory import memory_bytes
from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity, LinkEstimate, Provider
from schemas.deployment import Deployment, Settings
from simulator.files import read_scenario, shipped
from simulator.model import manifest_of, model_digest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = read_scenario(shipped()["smart-city"]).model
MANIFEST, DIGEST = manifest_of(MODEL), model_digest(MODEL)
WISH = Deployment(name=DeploymentName("model"), model=DIGEST, settings=Settings(context_tokens=1024, max_sequences=4))
LINKS_MEASURED = 64
"""By each node at most, half of them to its own site."""
ALL_MAX, KNOWN_MAX = 250, 130
"""Among more nodes a plan is not looked for without a shortlist, or with all links known, which takes minutes."""
SIZES = ((100, 4), (100, 20), (250, 10), (1000, 20), (5000, 100))


class Cluster:
    """One, drawn from a seed."""

    def __init__(self, nodes: int, sites: int, seed: int) -> None:
        self._rng = rng = np.random.default_rng(seed)
        self.names = [NodeId(f"n{number:04}") for number in range(nodes)]
        self._site = rng.permutation(np.arange(nodes) % sites)
        self._place = rng.random((sites, 2))
        self._speed = np.exp(rng.normal(0, 0.6, nodes))
        whole = sum(memory_bytes(block, WISH.settings) for block in MANIFEST.blocks)
        self._free = (whole * rng.uniform(0.1, 0.4, nodes)).astype(int)

    def seen(self) -> Snapshot:
        """What the orchestrator knows of it."""
        every = range(len(self.names))
        by_site = {site: np.flatnonzero(self._site == site) for site in set(self._site.tolist())}
        found = []
        for a in every:
            near = self._rng.permutation(by_site[int(self._site[a])])[: LINKS_MEASURED // 2]
            far = self._rng.permutation(len(self.names))[: LINKS_MEASURED - len(near)]
            peers = sorted({int(b) for b in (*near, *far)} - {a})
            found.append(self._capacity(a, [self._link(a, b, float(np.exp(self._rng.normal(0, 0.05)))) for b in peers]))
        return _snapshot(found)

    def known(self, nodes: set[NodeId] | None = None) -> dict[NodeId, Capacity]:
        """Those nodes, or all, as they truly are, with all links between them."""
        chosen = [a for a, name in enumerate(self.names) if nodes is None or name in nodes]
        return {self.names[a]: self._capacity(a, [self._link(a, b, 1.0) for b in chosen if b != a]) for a in chosen}

    def speed(self, name: NodeId) -> float:
        """Relative to others."""
        return float(self._speed[self.names.index(name)])

    def _capacity(self, a: int, links: list[LinkEstimate]) -> Capacity:
        speed, free = float(self._speed[a]), int(self._free[a])
        return Capacity(
            node=self.names[a],
            boot="b",
            sequence=0,
            issued_at=NOW,
            version="0",
            provider=Provider(name="cpu", device="cpu", flops_per_s=4e11 * speed, bytes_per_s=2e10 * speed),
            threads=4,
            memory_total_bytes=free,
            memory_free_bytes=free,
            disk_free_bytes=1 << 40,
            load=0.0,
            links=tuple(links),
        )

    def _link(self, a: int, b: int, noise: float) -> LinkEstimate:
        apart = float(np.linalg.norm(self._place[self._site[a]] - self._place[self._site[b]]))
        rate = 1.25e8 if self._site[a] == self._site[b] else 1.25e7
        rtt_ms = (0.4 + 20.0 * apart) * noise
        return LinkEstimate(peer=self.names[b], rtt_ms=rtt_ms, goodput_bytes_per_s=rate / noise, direct=True)


def _snapshot(capacities: list[Capacity]) -> Snapshot:
    found = fold(Snapshot(term=1), ManifestKnown(DIGEST, MANIFEST), NOW)
    found = fold(found, DeploymentWritten(WISH), NOW)
    for capacity in capacities:
        found = fold(found, CapacityReceived(capacity), NOW)
    return found


def among_likeliest(snapshot: Snapshot) -> Proposal:
    return planned_anew(snapshot, WISH, MANIFEST, NOW, "a benchmark")


def among_all(snapshot: Snapshot) -> Proposal:
    return make_plan(WISH, MANIFEST, believed_rooms(snapshot, WISH, MANIFEST), 1, None, "a benchmark")


def truly_ms(cluster: Cluster, proposal: Proposal) -> float:
    """What a token takes by the links as they are."""
    chains = proposal.plan.chains
    hosts = hosts_of(cluster.known({NodeId(node) for node in proposal.plan.nodes}), MANIFEST, DIGEST)
    return forecast(chains, hosts, MANIFEST).tpot_ms


def measure(sizes: tuple[tuple[int, int], ...], seeds: range) -> list[Row]:
    rows = []
    for nodes, sites in sizes:
        clusters = [Cluster(nodes, sites, seed) for seed in seeds]
        best = None
        if nodes <= KNOWN_MAX:
            best = [truly_ms(one, among_all(_snapshot(list(one.known().values())))) for one in clusters]
        ways: list[tuple[str, Callable[[Snapshot], Proposal]]] = [("shortlist", among_likeliest)]
        if nodes <= ALL_MAX:
            ways.append(("all nodes", among_all))
        snapshots = [one.seen() for one in clusters]
        for name, way in ways:
            taken, seconds = [], []
            for one, snapshot in zip(clusters, snapshots, strict=True):
                # As a look finds it: what is worked out once for a snapshot is part of it.
                fresh = replace(snapshot)
                began = time.process_time()
                proposal = way(fresh)
                seconds.append(time.process_time() - began)
                taken.append(truly_ms(one, proposal))
            row: Row = {
                "name": name,
                "nodes": nodes,
                "sites": sites,
                "seeds": len(seeds),
                "token_ms": round(statistics.median(taken), 2),
                "cpu_s": round(statistics.median(seconds), 3),
                "cpu_s_worst": round(max(seconds), 3),
            }
            if best is not None:
                gaps = [ms / least - 1 for ms, least in zip(taken, best, strict=True)]
                row |= {"gap": round(statistics.median(gaps), 4), "gap_worst": round(max(gaps), 4)}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure planning among some of very many nodes.")
    parser.add_argument("--quick", action="store_true", help="two clusters of the smaller sizes, to see that it works")
    quick = parser.parse_args().quick
    rows = measure(SIZES[:2] if quick else SIZES, range(2) if quick else range(11))
    if not quick:
        report("shortlist", "plans among some of very many nodes", rows, load_average=os.getloadavg())


if __name__ == "__main__":
    main()
