"""PURE: what a way for blocks to lie costs, with requests going where that is best (`mathematics.md`, C1).

    cost = sum over what lies where of what keeping it costs, and changing it, paid back over the period
         + sum over callers and models of lambda * (the cheapest share: from memory, from disks, absent)

so that no node does more work, or takes more energy, than it can. Where the cheapest way of all requests keeps that, it
is the answer; else a linear program shares them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from orchestrator.residency.problem import Chosen, Floats, Lying, Setting, Table


@dataclass(frozen=True)
class Reckoned:
    """What a second costs."""

    keeping: float
    """What lies where, and getting it there."""
    serving: float
    """What requests wait, and are worth."""
    from_memory: float
    """The share of the requests that is served from memory,"""
    from_disk: float
    """from disks; what is left goes elsewhere."""

    @property
    def cost(self) -> float:
        return self.keeping + self.serving


@dataclass(frozen=True)
class Flow:
    """Requests of a caller over a hosting, if it pays."""

    row: int
    hosting: int
    from_memory: bool
    rate: float
    cost: float
    otherwise: float
    """What one costs that nothing serves."""


def reckon(setting: Setting, lying: Lying) -> Reckoned:
    """The cost of this lying."""
    table = setting.table
    able = table.able(lying)
    flows = list(_flows(setting, table, able))
    shares = _shares(table, flows)
    absent = sum(float(one.rates @ one.absent) for one in setting.wanted)
    saved = sum(share * flow.rate * (flow.otherwise - flow.cost) for flow, share in zip(flows, shares, strict=True))
    total = sum(float(one.rates.sum()) for one in setting.wanted) or 1.0
    memory = sum(s * flow.rate for flow, s in zip(flows, shares, strict=True) if flow.from_memory)
    disk = sum(s * flow.rate for flow, s in zip(flows, shares, strict=True) if not flow.from_memory)
    return Reckoned(keeping(setting, lying), absent - saved, memory / total, disk / total)


def keeping(setting: Setting, lying: Lying) -> float:
    table = setting.table
    return float(table.keep_disk @ table.flags(lying.stored) + table.keep_memory @ table.flags(lying.resident))


def _flows(setting: Setting, table: Table, able: Chosen) -> Iterator[Flow]:
    rows = 0
    for one, first, (resident, stored) in zip(setting.wanted, table.firsts, table.costs, strict=False):
        for number in range(len(one.hostings)):
            hosting = int(first) + number
            if not able.stored[hosting]:
                continue
            from_memory = bool(able.resident[hosting])
            costs = (resident if from_memory else stored)[:, number]
            for caller in np.flatnonzero((costs < one.absent) & (one.rates > 0.0)):
                rate, cost = float(one.rates[caller]), float(costs[caller])
                yield Flow(rows + int(caller), hosting, from_memory, rate, cost, float(one.absent[caller]))
        rows += len(one.rates)


def _shares(table: Table, flows: list[Flow]) -> Floats:
    """Of each flow the share of its caller's requests that takes it."""
    if not flows:
        return np.zeros(0)
    gains = np.array([flow.rate * (flow.otherwise - flow.cost) for flow in flows])
    shares = np.zeros(len(flows))
    best: dict[int, int] = {}
    for number, flow in enumerate(flows):
        if flow.row not in best or gains[number] > gains[best[flow.row]]:
            best[flow.row] = number
    shares[list(best.values())] = 1.0
    limits = (table.asks[[flow.hosting for flow in flows]] * np.array([flow.rate for flow in flows])[:, None]).T
    if (limits @ shares <= table.strength * (1.0 + 1e-9)).all():
        return shares
    rows = sorted({flow.row for flow in flows})
    place = {row: number for number, row in enumerate(rows)}
    once = coo_array(
        (np.ones(len(flows)), ([place[flow.row] for flow in flows], range(len(flows)))), shape=(len(rows), len(flows))
    )
    bounded = np.isfinite(table.strength)
    stacked = vstack([once, coo_array(limits[bounded])])
    most = np.concatenate([np.ones(len(rows)), table.strength[bounded]])
    found = linprog(-gains, A_ub=stacked, b_ub=most, bounds=(0, None))
    assert found.success, f"sharing requests out always has a solution, all elsewhere: {found.message}"
    return np.asarray(found.x)
