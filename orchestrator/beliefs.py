"""PURE: what to believe of block times that are measured noisily, or were never measured on a node.

A measured time is smoothed over heartbeats, so that a noisy second moves nothing while a node that is slowed
shows within a planning period. A time that was never measured is the roofline's, which promises what no node
keeps: it is scaled by how much slower than their rooflines the nodes that did run this model are.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import exp
from statistics import median

import numpy as np

from profiler.compute import DECODE, ROW, Floats, ModelTimes, Times, filled, roofline
from profiler.host import Host
from profiler.network import DEFAULT_RTT_MS, links_by_peer
from profiler.sizes import Sizes, sizes_of
from schemas.base import Digest, NodeId
from schemas.capacity import Capacity, LinkEstimate
from schemas.manifest import Manifest

SMOOTHING_S = 3.0
"""Of 20 % noise a second this leaves 8 %; of a change it shows four fifths after one planning period of 5 s."""
STEADY_S = 30.0
"""Loads are smoothed over this: a queue at 70 % load makes three times as much of a difference as it is."""
STEADY_SPAN = 1.25
"""Three times what noise of 20 % a second leaves after `SMOOTHING_S`."""
GUESS_PRUDENCE = 1.25
"""A guess has to promise a quarter more than a measurement before it is preferred."""

GUESSED_NODES_MAX = 256
"""Of more nodes there are too many pairs to guess about one by one; plans are looked for among fewer
(`orchestrator.shortlist`)."""


def smoothed(before: Times, said: Times, elapsed_s: float, over_s: float = SMOOTHING_S) -> Times:
    """Times weighted exponentially over `over_s`, after a heartbeat that `said` these and came `elapsed_s` after the
    one before."""
    weight = 1 - exp(-max(elapsed_s, 0) / over_s)
    return {model: _between(before.get(model), new, weight) for model, new in said.items()}


def steadied(before: Times, said: Times, elapsed_s: float, now: Times) -> Times:
    """Times smoothed over `STEADY_S`, and never further than `STEADY_SPAN` from those of `now`: what is more than
    noise, a spike that is over or a node that slows, shows in loads as soon as in times."""
    calm = smoothed(before, said, elapsed_s, STEADY_S)
    return {model: _near(times, now[model]) for model, times in calm.items()}


def _near(calm: ModelTimes, now: ModelTimes) -> ModelTimes:
    held = np.minimum(np.maximum(calm.ms, now.ms / STEADY_SPAN), now.ms * STEADY_SPAN)
    return replace(calm, ms=held)


def _between(old: ModelTimes | None, new: ModelTimes, weight: float) -> ModelTimes:
    if old is None:
        return new
    before = old.ms if old.blocks == new.blocks else _columns(old, new.blocks)
    mixed = before + weight * (new.ms - before)
    # What was not known before is as it is said now, and what is not known now is not known.
    return replace(new, ms=np.where(np.isnan(mixed), new.ms, mixed))


def _columns(times: ModelTimes, blocks: tuple[int, ...]) -> Floats:
    """The times of these blocks, NaN for those that are not among them."""
    found = np.full((len(times.ms), len(blocks)), np.nan)
    known = {block: column for column, block in enumerate(times.blocks)}
    for column, block in enumerate(blocks):
        if block in known:
            found[:, column] = times.ms[:, known[block]]
    return found


def believed(
    capacities: Mapping[NodeId, Capacity],
    times: Mapping[NodeId, Times],
    manifest: Manifest,
    digest: Digest,
    optimism: float,
) -> dict[NodeId, Host]:
    """The nodes with a time for every block of the model, so that planner and cost model see one truth.

    `optimism` is how many times slower than its roofline a node has to be expected (`optimism_of`).
    """
    return guessed(timed(capacities, times, manifest, digest, optimism))


def timed(
    capacities: Mapping[NodeId, Capacity],
    times: Mapping[NodeId, Times],
    manifest: Manifest,
    digest: Digest,
    optimism: float,
) -> dict[NodeId, Host]:
    """The same with the links and frames that they measured alone."""
    sizes, found = sizes_of(manifest), {}
    share, every = _slope_share(times, digest), frozenset(range(sizes.blocks))
    for name, capacity in capacities.items():
        known, promised = times.get(name, {}).get(digest), roofline(capacity.provider, sizes)
        own = slower_than_promised(known, promised)
        # A node that is slow on the blocks it runs is slow on the others too.
        ms = promised.ms * (own if own is not None else optimism * GUESS_PRUDENCE)
        if share is not None:
            # The kernels of a node that never ran the model gain from company what they gain elsewhere.
            ms[ROW] = share * ms[DECODE]
        guess = replace(promised, ms=ms)
        seen = guess if known is None else filled(known, _like_others(known, guess, sizes))
        found[name] = Host(capacity, seen, every, links_by_peer(capacity))
    return found


def _like_others(known: ModelTimes, guess: ModelTimes, sizes: Sizes) -> ModelTimes:
    """A guess with the times of blocks of the same kind that this node ran. Its own roofline knows neither kernels nor
    caches."""
    first: dict[int, int] = {}
    for column, block in enumerate(known.blocks):
        if block < sizes.blocks:
            first.setdefault(sizes.kinds[block], column)
    alike = {block: first[kind] for block, kind in enumerate(sizes.kinds) if kind in first}
    if not alike:
        return guess
    return filled(ModelTimes(tuple(alike), known.ms[:, [*alike.values()]], known.rows_min[[*alike.values()]]), guess)


def _slope_share(times: Mapping[NodeId, Times], digest: Digest) -> float | None:
    """What a further sequence adds to a step of this model over what one takes, on the nodes that measured it."""
    shares = []
    for models in times.values():
        if (known := models.get(digest)) is None:
            continue
        sloped = ~np.isnan(known.ms[ROW])
        if (decode_ms := float(known.ms[DECODE][sloped].sum())) > 0:
            shares.append(float(known.ms[ROW][sloped].sum()) / decode_ms)
    return median(shares) if shares else None


def guessed(hosts: dict[NodeId, Host]) -> dict[NodeId, Host]:
    """The nodes with a guess in place of what each of them did not measure of links and frames."""
    return _with_guessed_links(_with_guessed_frames(hosts))


def _with_guessed_frames(hosts: dict[NodeId, Host]) -> dict[NodeId, Host]:
    """What a frame costs where none was handled yet: what it costs the others. For nothing it is nowhere."""
    known = [host.capacity.frame_ms for host in hosts.values() if host.capacity.frame_ms is not None]
    if not known or len(known) == len(hosts):
        return hosts
    usual = {"frame_ms": median(known)}
    return {
        name: host
        if host.capacity.frame_ms is not None
        else replace(host, capacity=host.capacity.model_copy(update=usual))
        for name, host in hosts.items()
    }


def _with_guessed_links(hosts: dict[NodeId, Host]) -> dict[NodeId, Host]:
    """A round trip for every pair that never measured each other: a little more than what the others measured.

    Where links are slow, or the machines busy, a pair that nobody has tried yet must not look the better for it.
    """
    if len(hosts) > GUESSED_NODES_MAX:
        return hosts
    strangers = {
        name: [peer for peer in hosts if peer > name and peer not in host.links and name not in hosts[peer].links]
        for name, host in hosts.items()
    }
    if not any(strangers.values()):
        return hosts
    measured = [link.rtt_ms for host in hosts.values() for link in host.links.values() if link.up]
    if not measured:
        return hosts
    guessed_ms = max(DEFAULT_RTT_MS, GUESS_PRUDENCE * median(measured))
    towards = {peer: LinkEstimate(peer=peer, rtt_ms=guessed_ms, direct=True) for peer in hosts}
    return {name: _linked(host, [towards[peer] for peer in strangers[name]]) for name, host in hosts.items()}


def _linked(host: Host, more: list[LinkEstimate]) -> Host:
    if not more:
        return host
    capacity = host.capacity.model_copy(update={"links": (*host.capacity.links, *more)})
    return replace(host, capacity=capacity, links=links_by_peer(capacity))


def optimism_of(
    capacities: Mapping[NodeId, Capacity],
    times: Mapping[NodeId, Times],
    manifest: Manifest,
    digest: Digest,
    before: float | None,
) -> float:
    """How much slower than its roofline the best node ran this model, at least 1; the least ever seen.

    The least and not the last: when the only node that runs the model is slowed, this says nothing about others.
    """
    sizes = sizes_of(manifest)
    ratios = [
        slower_than_promised(known, roofline(capacity.provider, sizes))
        for name, capacity in capacities.items()
        if (known := times.get(name, {}).get(digest)) is not None
    ]
    seen = [ratio for ratio in ratios if ratio is not None]
    if before is not None:
        seen.append(before)
    return max(1.0, min(seen, default=1.0))


def slower_than_promised(known: ModelTimes | None, promised: ModelTimes) -> float | None:
    """Measured over promised time of the blocks this node ran, or None if it ran none."""
    columns = [] if known is None else [at for at, block in enumerate(known.blocks) if block < len(promised.blocks)]
    if known is None or not columns:
        return None
    ran = [known.blocks[at] for at in columns]
    return float(known.ms[DECODE, columns].sum() / promised.ms[DECODE, ran].sum())


def slower_times(times: Times, factor: float) -> Times:
    """Times `factor` times as long."""
    return {model: one.slower(factor) for model, one in times.items()}
