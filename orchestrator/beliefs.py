"""PURE: what to believe of block times that are measured noisily, or were never measured on a node.

A measured time is smoothed over heartbeats, so that a noisy second moves nothing while a node that is slowed
shows within a planning period. A time that was never measured is the roofline's, which promises what no node
keeps: it is scaled by how much slower than their rooflines the nodes that did run this model are.
"""

from collections.abc import Mapping
from math import exp
from statistics import median

from profiler.compute import roofline
from profiler.network import DEFAULT_RTT_MS
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime, Capacity, LinkEstimate
from schemas.manifest import Block, Manifest

SMOOTHING_S = 3.0
"""Of 20 % noise a second this leaves 8 %; of a change it shows four fifths after one planning period of 5 s."""
STEADY_S = 30.0
"""Loads are smoothed over this: a queue at 70 % load makes three times as much of a difference as it is."""
STEADY_SPAN = 1.25
"""Three times what noise of 20 % a second leaves after `SMOOTHING_S`."""
GUESS_PRUDENCE = 1.25
"""A guess has to promise a quarter more than a measurement before it is preferred."""

GUESSED_NODES_MAX = 64
"""Beyond this a cluster has sites, and too many pairs to guess about one by one."""

TERMS = ("decode_ms", "decode_ms_per_context_token", "prefill_ms", "prefill_ms_per_token")
"""What of a block's time grows with the time itself, beside what a further sequence adds."""

Times = Mapping[tuple[Digest, int], BlockTime]
Kind = tuple[str, int, int]
"""What a block is, the bytes of its weights, and what a token takes of it."""


def smoothed(before: Times, capacity: Capacity, elapsed_s: float, over_s: float = SMOOTHING_S) -> Times:
    """Times weighted exponentially over `over_s`, after a heartbeat that came `elapsed_s` after the one before."""
    weight = 1 - exp(-max(elapsed_s, 0) / over_s)
    return {
        (time.model, time.block): _between(before.get((time.model, time.block)), time, weight)
        for time in capacity.block_times
    }


def steadied(before: Times, capacity: Capacity, elapsed_s: float, now: Times) -> Times:
    """Times smoothed over `STEADY_S`, and never further than `STEADY_SPAN` from those of `now`: what is more than
    noise, a spike that is over or a node that slows, shows in loads as soon as in times."""
    calm = smoothed(before, capacity, elapsed_s, STEADY_S)
    return {key: _near(time, now[key]) for key, time in calm.items()}


def _near(calm: BlockTime, now: BlockTime) -> BlockTime:
    def held(value: float, about: float) -> float:
        return min(max(value, about / STEADY_SPAN), about * STEADY_SPAN)

    slope = calm.decode_ms_per_row
    if slope is not None and now.decode_ms_per_row is not None:
        slope = held(slope, now.decode_ms_per_row)
    terms = {name: held(getattr(calm, name), getattr(now, name)) for name in TERMS}
    return calm.model_copy(update={**terms, "decode_ms_per_row": slope})


def _between(old: BlockTime | None, new: BlockTime, weight: float) -> BlockTime:
    if old is None or old == new:
        return new
    terms = {name: (1 - weight) * getattr(old, name) + weight * getattr(new, name) for name in TERMS}
    slope = new.decode_ms_per_row
    if slope is not None and old.decode_ms_per_row is not None:
        slope = old.decode_ms_per_row + weight * (slope - old.decode_ms_per_row)
    return new.model_copy(update={**terms, "decode_ms_per_row": slope})


def believed(
    capacities: Mapping[NodeId, Capacity],
    times: Mapping[NodeId, Times],
    manifest: Manifest,
    digest: Digest,
    optimism: float,
) -> dict[NodeId, Capacity]:
    """The capacities with a time for every block of the model, so that planner and cost model see one truth.

    `optimism` is how many times slower than its roofline a node has to be expected (`optimism_of`).
    """
    found = {}
    share = _slope_share(times, digest)
    for name, capacity in capacities.items():
        known = times.get(name, {})
        own = _ratio(capacity, known, manifest, digest)
        # A node that is slow on the blocks it runs is slow on the others too.
        alike = _by_kind(known, manifest, digest)
        factor = own if own is not None else optimism * GUESS_PRUDENCE
        blocks = tuple(
            known.get((digest, block))
            or _like_another(alike, manifest, block)
            or _sloped(_scaled(roofline(capacity, manifest, digest, block), factor), share)
            for block in range(len(manifest.blocks))
        )
        found[name] = capacity.model_copy(update={"block_times": blocks})
    return _with_guessed_links(_with_guessed_frames(found))


def _by_kind(known: Times, manifest: Manifest, digest: Digest) -> Mapping[Kind, BlockTime]:
    """The first block of each kind that a node ran."""
    found: dict[Kind, BlockTime] = {}
    for what in manifest.blocks if known else ():
        time = known.get((digest, what.index))
        if time is not None:
            found.setdefault(_kind(what), time)
    return found


def _like_another(alike: Mapping[Kind, BlockTime], manifest: Manifest, block: int) -> BlockTime | None:
    """The time of a block that is of the same kind and that this node ran: layers of a model differ by their weights'
    values alone. Its own roofline knows neither kernels nor caches."""
    time = alike.get(_kind(manifest.blocks[block])) if alike else None
    return None if time is None else time.model_copy(update={"block": block})


def _kind(block: Block) -> Kind:
    return (block.role, block.weight_bytes, block.flops_per_token)


def _slope_share(times: Mapping[NodeId, Times], digest: Digest) -> float | None:
    """What a further sequence adds to a step of this model over what one takes, on the nodes that measured it."""
    shares = []
    for known in times.values():
        own = [time for (model, _), time in known.items() if model == digest and time.decode_ms_per_row is not None]
        if (decode_ms := sum(time.decode_ms for time in own)) > 0:
            shares.append(sum(time.decode_ms_per_row or 0.0 for time in own) / decode_ms)
    return median(shares) if shares else None


def _sloped(guess: BlockTime, share: float | None) -> BlockTime:
    """A guess at a node that never ran the model: its kernels gain from company what they gain elsewhere."""
    return guess if share is None else guess.model_copy(update={"decode_ms_per_row": share * guess.decode_ms})


def _with_guessed_frames(capacities: dict[NodeId, Capacity]) -> dict[NodeId, Capacity]:
    """What a frame costs where none was handled yet: what it costs the others. For nothing it is nowhere."""
    known = [capacity.frame_ms for capacity in capacities.values() if capacity.frame_ms is not None]
    if not known or len(known) == len(capacities):
        return capacities
    usual = {"frame_ms": median(known)}
    return {
        name: capacity if capacity.frame_ms is not None else capacity.model_copy(update=usual)
        for name, capacity in capacities.items()
    }


def _with_guessed_links(capacities: dict[NodeId, Capacity]) -> dict[NodeId, Capacity]:
    """A round trip for every pair that never measured each other: a little more than what the others measured.

    Where links are slow, or the machines busy, a pair that nobody has tried yet must not look the better for it.
    """
    pairs = {(name, link.peer): link for name, capacity in capacities.items() for link in capacity.links if link.up}
    if not pairs or len(capacities) > GUESSED_NODES_MAX:
        return capacities
    usual_ms = median(link.rtt_ms for link in pairs.values())
    guessed_ms = max(DEFAULT_RTT_MS, GUESS_PRUDENCE * usual_ms)
    known = {frozenset((name, link.peer)) for name, capacity in capacities.items() for link in capacity.links}
    return {
        name: capacity.model_copy(
            update={
                "links": (
                    *capacity.links,
                    *(
                        LinkEstimate(peer=peer, rtt_ms=guessed_ms, direct=True)
                        for peer in capacities
                        if peer > name and frozenset((name, peer)) not in known
                    ),
                )
            }
        )
        for name, capacity in capacities.items()
    }


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
    ratios = [_ratio(capacity, times.get(name, {}), manifest, digest) for name, capacity in capacities.items()]
    seen = [ratio for ratio in ratios if ratio is not None]
    if before is not None:
        seen.append(before)
    return max(1.0, min(seen, default=1.0))


def _ratio(capacity: Capacity, known: Times, manifest: Manifest, digest: Digest) -> float | None:
    """Measured over promised time of the blocks this node ran, or None if it ran none."""
    blocks = [block for block in range(len(manifest.blocks)) if (digest, block) in known]
    promised = sum(roofline(capacity, manifest, digest, block).decode_ms for block in blocks)
    return sum(known[digest, block].decode_ms for block in blocks) / promised if blocks else None


def slower(capacity: Capacity, factor: float) -> Capacity:
    """A node all of whose blocks take `factor` times as long."""
    if factor == 1.0:
        return capacity
    return capacity.model_copy(update={"block_times": tuple(_scaled(time, factor) for time in capacity.block_times)})


def slower_times(times: Times, factor: float) -> Times:
    """Times `factor` times as long."""
    return times if factor == 1.0 else {key: _scaled(time, factor) for key, time in times.items()}


def _scaled(time: BlockTime, factor: float) -> BlockTime:
    slope = time.decode_ms_per_row
    scaled = {name: factor * getattr(time, name) for name in TERMS}
    return time.model_copy(update={**scaled, "decode_ms_per_row": None if slope is None else factor * slope})
