"""`resplit deploy`, `remove` and `status`: what operators ask the orchestrator."""

import asyncio
import re
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Url
from resplit.output import print_json, print_table, progress_bar, size
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from schemas.control import DeploymentStatus, NodeStatus
    from schemas.leader import Leadership
    from schemas.plan import Plan

DEPLOY_TIMEOUT_S = 900.0
"""Nodes may have to fetch gigabytes before they are ready."""
DEFAULTS = Settings()


def deploy(
    model: Annotated[str, typer.Argument(help="A model in the orchestrator's store, by name or digest.")],
    url: Url = DEFAULT_URL,
    name: Annotated[str | None, typer.Option(help="What clients call it; default: like the model.")] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Into how many stages to cut; default: planned.")] = None,
    place: Annotated[str | None, typer.Option(help="Insist on a placement, as `n0:0-3,n1:4-9`.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Longest sequence, in tokens.")] = DEFAULTS.context_tokens,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = DEFAULTS.max_sequences,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = DEFAULTS.max_queued,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prefill chunk.")] = DEFAULTS.chunk_tokens,
    depth: Annotated[int, typer.Option(min=1, help="Batches in flight at once.")] = DEFAULTS.pipeline_depth,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant/--batch-variant", help="Tokens never depend on who shares the batch, or may for speed."
        ),
    ] = DEFAULTS.batch_invariant,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Wait so many seconds at most.")] = DEPLOY_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Run MODEL on the nodes there are, or change how it is run.

    Deploying a name again with other options re-plans it while it serves.
    """
    from resplit import control  # noqa: PLC0415
    from schemas.control import DeployRequest  # noqa: PLC0415

    settings = Settings(
        chunk_tokens=chunk,
        context_tokens=context,
        max_sequences=sequences,
        max_queued=queue,
        pipeline_depth=depth,
        batch_invariant=batch_invariant,
    )
    placement = None if place is None else parse_placement(place)
    called = name or default_name(model)
    request = DeployRequest(name=called, model=model, settings=settings, stages=stages, placement=placement)
    if not wait:
        reply = asyncio.run(control.deploy(url, request))
        if as_json:
            print_json(reply)
        else:
            print(f"{called}: accepted; as of now {_chain(reply.stages)}")
        return
    with progress_bar() as progress:

        def show(found: "DeploymentStatus") -> None:
            if found.candidate is not None:
                progress(f"nodes ready for epoch {found.candidate.epoch}", len(found.ready), len(found.candidate.nodes))

        served = asyncio.run(control.deploy_and_wait(url, request, timeout, show))
    if as_json:
        print_json(served)
        return
    assert served.current is not None
    print(f"{called}: serving {served.model_name}, epoch {served.current.epoch}, {_routes(served.current)}")


def remove(
    name: Annotated[str, typer.Argument(help="The deployment to end.")], url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """End a deployment: what runs finishes, new requests are refused, then its blocks are unloaded."""
    from resplit import control  # noqa: PLC0415

    reply = asyncio.run(control.remove(url, DeploymentName(name)))
    if as_json:
        print_json(reply)
    else:
        print(f"{reply.name}: removed; it drains")


def status(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the nodes and the deployments as the orchestrator sees them."""
    from resplit import control  # noqa: PLC0415

    reply = asyncio.run(control.status(url))
    if as_json:
        print_json(reply)
        return
    if reply.leader is not None:
        print(_led(reply.leader, reply.standbys))
    if not reply.nodes:
        print("no node has reported; start one with `resplit agent`")
    else:
        columns = ["node", "state", "on", "threads", "memory free", "of", "load", "heard", "blocks"]
        print_table("Nodes", columns, [_node_row(node) for node in reply.nodes])
    print()
    if not reply.deployments:
        print("nothing is deployed; start with `resplit deploy MODEL`")
        return
    columns = ["deployment", "model", "state", "epoch", "stages", "TPOT ms", "remarks"]
    print_table("Deployments", columns, [_deployment_row(found) for found in reply.deployments])


def parse_placement(text: str) -> tuple[Stage, ...]:
    """Stages from `n0:0-3,n1:4`; raises `ResplitError(INVALID_REQUEST)`."""
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z0-9][a-z0-9_-]{0,62}):(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            message = f"{part!r} is not a stage such as n0:0-3 (node, first and last block)"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "place")
        first, last = int(match[2]), int(match[3] or match[2])
        if last < first:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"{part!r} ends before it starts", "place")
        stages.append(Stage(node=NodeId(match[1]), first=first, last=last))
    return tuple(stages)


def default_name(model: str) -> str:
    """A deployment's name made from a model's: what may stand in a subject, 63 characters at most."""
    short = model[:12] if re.fullmatch(r"[0-9a-f]{64}", model) else model
    return re.sub(r"[^a-z0-9_-]+", "-", short.lower()).strip("-_")[:63]


def _led(leader: "Leadership", standbys: tuple[str, ...]) -> str:
    since = leader.since.astimezone().isoformat(sep=" ", timespec="seconds")
    others = f"standing by: {', '.join(standbys)}" if standbys else "nobody stands by"
    return f"{leader.leader} leads in term {leader.term} since {since}; {others}"


def _node_row(node: "NodeStatus") -> list[str]:
    capacity = node.capacity
    hosted = [f"{s.deployment}/{s.epoch}:{_ranges(s.blocks)} {s.state}" for s in capacity.stages]
    return [
        capacity.node,
        "lost" if node.lost else "up",
        f"{capacity.provider.name} ({capacity.provider.device})",
        str(capacity.threads),
        size(capacity.memory_free_bytes),
        size(capacity.memory_total_bytes),
        f"{100 * capacity.load:.0f} %",
        f"{node.age_s:.1f} s ago",
        ", ".join(hosted) or "-",
    ]


def _deployment_row(found: "DeploymentStatus") -> list[str]:
    remarks = [] if found.reason is None else [found.reason]
    if found.error is not None:
        remarks.append(f"{found.error.message} ({found.error.code})")
    predicted = (found.estimate or {}).get("tpot_ms")
    return [
        found.name,
        found.model_name or "-",
        found.state,
        "-" if found.current is None else str(found.current.epoch),
        "-" if found.current is None else _routes(found.current),
        "-" if predicted is None else f"{predicted:.1f}",
        "; ".join(remarks),
    ]


def _routes(plan: "Plan") -> str:
    return " | ".join(_chain(route.stages) for route in plan.routes)


def _chain(stages: tuple[Stage, ...]) -> str:
    return " > ".join(f"{stage.node}:{stage.first}-{stage.last}" for stage in stages)


def _ranges(blocks: tuple[int, ...]) -> str:
    starts = [b for b in blocks if b - 1 not in blocks]
    ends = [b for b in blocks if b + 1 not in blocks]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
