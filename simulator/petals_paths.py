"""PURE: Petals' clients: the shortest path over the blocks that servers host, and further ones beside it."""

from itertools import pairwise

import numpy as np

from orchestrator.solvers.problem import Floats, Mask, Piece, Problem

CLIENTS_MAX = 8
"""Nodes that are tried as a client, those that are fastest at both ends of the model."""


def cheapest_paths(problem: Problem, hosts: Mask, most: int) -> tuple[tuple[Piece, ...], ...]:
    """At most `most` paths, each of a client that holds both ends and of the servers that `hosts`, [M, L], names.

    The first is the shortest there is, by time per token. A node that k paths use already counts as 1 + k times as slow
    for the next, which is found as long as it brings a server that no other path uses. None where no path exists.
    """
    used = np.zeros(problem.nodes)
    clients = _clients(problem)
    found: list[tuple[Piece, ...]] = []
    while len(found) < most:
        time = problem.time_ns * (1 + used)[:, None]
        paths = [path for client in clients if (path := _shortest(problem, time, hosts, client)) is not None]
        if not paths:
            break
        _, nodes = min(paths, key=lambda path: path[0])
        servers = np.unique(nodes[1:-1])
        if found and used[servers].all():
            break
        used[servers] += 1
        cuts = [0, *(b for b in range(1, problem.blocks) if nodes[b] != nodes[b - 1]), problem.blocks]
        found.append(tuple(Piece(nodes[a], a, b - 1) for a, b in pairwise(cuts)))
    return tuple(found)


def _clients(problem: Problem) -> list[int]:
    """Nodes that may hold the ends and have the room, the fastest first."""
    need = problem.need_bytes[:, [0, -1]].sum(axis=1)
    able = problem.may_run[:, [0, -1]].all(axis=1) & (need <= problem.free_bytes)
    order = np.argsort(problem.time_ns[:, [0, -1]].sum(axis=1), kind="stable")
    return [int(node) for node in order if able[node]][:CLIENTS_MAX]


def _shortest(problem: Problem, time: Floats, hosts: Mask, client: int) -> tuple[float, list[int]] | None:
    """The time of the shortest path of a client, by Dijkstra over blocks in their order, and the node of each block."""
    nodes, last = np.arange(problem.nodes), problem.blocks - 1
    cost = np.full(problem.nodes, np.inf)
    cost[client] = time[client, 0]
    came: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    for block in range(1, last + 1):
        hop = problem.hop_ns[problem.kind_of[block - 1]][problem.site_of[:, None], problem.site_of[None, :]]
        total = cost[:, None] + hop
        total[nodes, nodes] = cost
        here = hosts[:, block] if block < last else nodes == client
        before = total.argmin(axis=0)
        came.append(before)
        cost = np.where(here, total[before, nodes] + time[:, block], np.inf)
    if cost[client] == np.inf:
        return None
    path = [client]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return float(cost[client]), path[::-1]
