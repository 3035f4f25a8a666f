"""PURE: one deployment and the rooms there are, to one plan of one or more routes, or one typed error."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.chain import Ways, beside, best_chain, ways_of
from orchestrator.rooms import Room
from orchestrator.trust import exposed
from profiler.forecast import Forecast, forecast, shared_out
from schemas.base import NodeId
from schemas.deployment import Chain, Deployment, Placement, Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan, Route

CONDUCTORS = 2
"""Nodes that conduct a pipeline where nobody says how many: to do so costs next to nothing, and either may be lost."""


@dataclass(frozen=True)
class Proposal:
    """A plan and what it is predicted to cost."""

    plan: Plan
    estimate: Forecast | None
    """None: nothing runs on it."""

    @property
    def terms(self) -> dict[str, float]:
        """What it is predicted to cost, term by term."""
        return {} if self.estimate is None else self.estimate.terms


def make_plan(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    epoch: int,
    previous: Plan | None,
    cause: str,
    avoid: frozenset[NodeId] = frozenset(),
    kept: Placement = (),
    routes: int = 1,
) -> Proposal:
    """The plan of the next epoch: the operator's own placement, else the fastest (or the most even) cuts.

    `avoid` are nodes to leave out where a plan without them exists, `kept` routes that run and stay, `routes` how many
    there are to be where the deployment does not say. A plan has fewer where no more fit beside one another
    (`check_routes`). Raises `ResplitError`: MODEL_TOO_LARGE naming the bytes short, INFEASIBLE where the bytes are
    there but no assignment is, INVALID_REQUEST where the deployment contradicts itself or the model, FORBIDDEN
    where the root does not let it run the model. The node of a route's first stage is its source: the ingress tokenises
    where the embedding is.
    """
    check_shape(deployment, manifest)
    settings, chains = deployment.settings, deployment.chains
    how = "as the operator placed it" if deployment.service_of is None else "as it is placed with its pipeline"
    if chains is not None:
        _check_placed(deployment, chains, manifest, rooms)
    else:
        usual = max(routes, len(kept), CONDUCTORS if manifest.pipeline is not None else 1)
        wanted = min(deployment.routes or usual, settings.max_sequences)
        chains, how = _routes(deployment, manifest, rooms, avoid, kept, wanted)
    estimate = forecast(chains, {name: room.host for name, room in rooms.items()}, manifest)
    parts = shared_out(settings.max_sequences, estimate.speeds)
    plan = Plan(
        deployment=deployment.name,
        model=deployment.model,
        epoch=epoch,
        previous=previous.digest if previous is not None else None,
        block_count=len(manifest.blocks),
        settings=settings,
        routes=tuple(
            Route(index=index, source=chain[0].node, stages=chain, max_sequences=part)
            for index, (chain, part) in enumerate(zip(chains, parts, strict=True))
        ),
        slo=deployment.slo,
        sealed=deployment.sealed,
        cloud=deployment.outside,
        reason=f"{cause}; {_size(chains)}, {how}, {estimate.tpot_ms:.2f} ms a step predicted",
    )
    return Proposal(plan, estimate)


def further_chain(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    taken: Placement,
    avoid: frozenset[NodeId] = frozenset(),
    ways: Ways | None = None,
    known: Chain = (),
) -> Chain | None:
    """The best route beside others, or None where none fits that brings a node which serves no route yet. `ways` and
    `known` as for `best_chain`."""
    used = {stage.node for chain in taken for stage in chain}
    left = {name: room for name, room in beside(rooms, taken).items() if name not in avoid}
    for offered in (left, {name: room for name, room in left.items() if name not in used}):
        try:
            chain, _ = best_chain(deployment, manifest, offered, ways=ways, known=known)
        except ResplitError:
            return None  # nothing fits beside them: that is an answer too
        if any(stage.node not in used for stage in chain):
            return chain
    return None


def check_routes(deployment: Deployment, plan: Plan) -> None:
    """Raises INFEASIBLE if the plan has fewer routes than the deployment asks for."""
    have = len(plan.routes)
    if deployment.routes is not None and have < deployment.routes:
        message = (
            f"{deployment.routes} routes are asked for, and {have} fit(s) beside one another on the nodes that are "
            f"here; ask for {have}, or add nodes"
        )
        raise ResplitError(ErrorCode.INFEASIBLE, message, "routes")


def check_shape(deployment: Deployment, manifest: Manifest) -> None:
    """Whether the deployment can be meant for this model at all; raises INVALID_REQUEST naming the field, and FORBIDDEN
    where the root's policy does not let it run the model."""
    if deployment.is_barred:
        raise ResplitError(ErrorCode.FORBIDDEN, barred(deployment), "model")
    if deployment.on_demand and manifest.pipeline is not None:
        message = f"{manifest.name!r} is a pipeline, whose services stay loaded; leave on_demand out"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "on_demand")
    if deployment.cloud is not None and manifest.pipeline is not None:
        message = f"{manifest.name!r} is a pipeline, which no cloud answers as a whole; leave cloud out"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "cloud")
    count = len(manifest.blocks)
    longest = manifest.text.context_length if manifest.text is not None else None
    settings = deployment.settings
    if longest is not None and settings.context_tokens > longest:
        message = f"context_tokens is {settings.context_tokens}, {manifest.name!r} reads at most {longest}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "settings.context_tokens")
    if deployment.stages is not None and deployment.stages > count:
        message = f"{manifest.name!r} has {count} block(s) and cannot be cut into {deployment.stages} stages"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "stages")
    if deployment.routes is not None and deployment.routes > settings.max_sequences:
        message = f"{deployment.routes} routes cannot share {settings.max_sequences} sequences, each needs one"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "routes")
    strange = [block for block in deployment.sensitive_of(count) if block >= count]
    if strange:
        message = f"block {min(strange)} cannot be sensitive: {manifest.name!r} has blocks 0 to {count - 1}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "sensitive")
    chains = deployment.chains
    if chains is None:
        return
    if not chains:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a placement needs at least one stage", "placement")
    if deployment.routes is not None and deployment.routes != len(chains):
        message = f"routes is {deployment.routes} but placement has {len(chains)}; leave one of them out"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "routes")
    if len(chains) > settings.max_sequences:
        message = f"{len(chains)} routes cannot share {settings.max_sequences} sequences, each needs one"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "placement")
    for number, chain in enumerate(chains):
        _check_chain(deployment, chain, manifest, place(deployment, number))
        if chain in chains[:number]:
            message = f"route {number} is the same as route {chains.index(chain)}; it would add nothing"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, place(deployment, number))


def fitted(settings: Settings, manifest: Manifest) -> Settings:
    """The same settings, `context_tokens` left at its default made the model's own context where that is shorter."""
    longest = manifest.text.context_length if manifest.text is not None else settings.context_tokens
    if settings.context_tokens == Settings().context_tokens and longest < settings.context_tokens:
        return settings.model_copy(update={"context_tokens": longest})
    return settings


def barred(deployment: Deployment) -> str:
    """Why a deployment that `is_barred` cannot run its model, and what to do."""
    others = ", ".join(model[:12] for model in deployment.models or ())
    return (
        f"the root's policy does not let {deployment.name!r} run model {deployment.model[:12]}, only {others}; "
        f"deploy one of those, or have the root name it: `resplit roster policy --model {deployment.name}=...`"
    )


def place(deployment: Deployment, route: int) -> str:
    """The field of a placement that a route stands in: a plain list of stages is the whole placement."""
    listed = deployment.placement is not None and deployment.placement == deployment.chains
    return f"placement.{route}" if listed else "placement"


def _check_chain(deployment: Deployment, chain: Chain, manifest: Manifest, field: str) -> None:
    count = len(manifest.blocks)
    if not chain:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a route needs at least one stage", field)
    if deployment.stages is not None and deployment.stages != len(chain):
        message = f"stages is {deployment.stages} but placement has {len(chain)}; leave one of them out"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "stages")
    expected = 0
    for position, stage in enumerate(chain):
        if stage.first != expected:
            message = f"stage {position} starts at block {stage.first}; block {expected} comes next"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, f"{field}.{position}.first")
        expected = stage.last + 1
    if expected != count:
        message = f"the placement ends at block {expected - 1}; {manifest.name!r} has blocks 0 to {count - 1}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, f"{field}.{len(chain) - 1}.last")


def _check_placed(deployment: Deployment, chains: Placement, manifest: Manifest, rooms: Mapping[NodeId, Room]) -> None:
    """Whether every node of a placement is there, has the memory, and may hold what is sensitive."""
    secret = deployment.sensitive_of(len(manifest.blocks))
    stages = [
        (f"{place(deployment, number)}.{position}.node", stage)
        for number, chain in enumerate(chains)
        for position, stage in enumerate(chain)
    ]
    for field, stage in stages:
        if stage.node not in rooms:
            known = ", ".join(rooms) or "none"
            message = f"node {stage.node!r} is not here; the nodes present are: {known}"
            raise ResplitError(ErrorCode.INFEASIBLE, message, field)
        shown = exposed(secret, stage.blocks, rooms[stage.node].trusted)
        if shown:
            message = (
                f"block {shown[0]} is sensitive and node {stage.node!r} is not trusted; place it elsewhere, or "
                f"run `resplit trust {stage.node}` if you trust it"
            )
            raise ResplitError(ErrorCode.INFEASIBLE, message, field)
    for field, stage in stages:
        room = rooms[stage.node]
        blocks = {b for _, other in stages if other.node == stage.node for b in other.blocks}
        need = sum(room.need_bytes[b] for b in blocks)
        if need > room.free_bytes:
            message = (
                f"node {stage.node!r} needs {need} bytes for its blocks of {manifest.name!r} "
                f"and has {room.free_bytes}, {need - room.free_bytes} bytes short"
            )
            raise ResplitError(ErrorCode.INFEASIBLE, message, field)


def _routes(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    avoid: frozenset[NodeId],
    kept: Placement,
    wanted: int,
) -> tuple[Placement, str]:
    chains, how, ways = list(kept[:wanted]), f"{len(kept)} as before", ways_of(rooms, manifest)
    if not chains:
        first, how = best_chain(deployment, manifest, rooms, avoid, ways)
        chains.append(first)
    while len(chains) < wanted:
        found = further_chain(deployment, manifest, rooms, tuple(chains), avoid, ways)
        if found is None:
            break
        chains.append(found)
    return tuple(chains), how


def _size(chains: Placement) -> str:
    if len(chains) == 1:
        return f"{len(chains[0])} stage(s)"
    return f"{len(chains)} routes over {len({stage.node for chain in chains for stage in chain})} nodes"
