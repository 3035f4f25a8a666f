"""`resplit deploy` and `remove`: what is to run."""

import asyncio
import re
from typing import Annotated

import typer
from pydantic import ValidationError

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Timeout, Url, Wait
from resplit.output import print_json
from resplit.view import chains, readiness
from schemas.base import DeploymentName, NodeId
from schemas.deployment import ROUTES_MAX, Chain, Cloud, Placement, Sensitive, Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.slo import BEST_EFFORT, PRIORITY_MAX, Slo

DEPLOY_TIMEOUT_S = 900.0
"""Nodes may have to fetch gigabytes before they are ready."""
PRIVATE_MAX = 9999
DEFAULTS = Settings()


def deploy(
    model: Annotated[str, typer.Argument(help="A model in the orchestrator's store, by name or digest.")],
    keys: Keys,
    url: Url = DEFAULT_URL,
    name: Annotated[str | None, typer.Option(help="What clients call it; default: like the model.")] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Into how many stages to cut; default: planned.")] = None,
    place: Annotated[
        str | None, typer.Option(help="Insist on a placement, as `n0:0-3,n1:4-9`; several routes with `|` between.")
    ] = None,
    routes: Annotated[
        int | None, typer.Option(min=1, max=ROUTES_MAX, help="How many routes share the requests; default: planned.")
    ] = None,
    sensitive: Annotated[
        str | None,
        typer.Option(help="Blocks for trusted nodes alone: `ends`, `ends:2`, `all`, or numbers as `0,5,11`."),
    ] = None,
    private: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=PRIVATE_MAX,
            help="Keep the embedding, the first and the last so many blocks, and sampling, to trusted nodes.",
        ),
    ] = None,
    sealed: Annotated[
        bool, typer.Option("--sealed/--open", help="Take only sealed requests; the first block is sensitive then.")
    ] = False,
    on_demand: Annotated[
        bool,
        typer.Option(
            "--on-demand/--always",
            help="Give memory up to others that are asked for, and load again for the next request.",
        ),
    ] = False,
    cloud: Annotated[
        str | None,
        typer.Option(
            help="Who answers what the nodes cannot: an endpoint that agents know, and a model, as `eu=big-1`."
        ),
    ] = None,
    cloud_waits: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds a request waits for a cold model before it goes there.")
    ] = 0.0,
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
    fast_recovery: Annotated[
        bool,
        typer.Option(
            "--fast-recovery/--exact-recovery", help="After a fault, prefill what came out; the answer says so."
        ),
    ] = DEFAULTS.recovery == "fast",
    ttft_ms: Annotated[float | None, typer.Option(help="Objective: the first token within so many ms.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Objective: ms a token after the first.")] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Refuse at once what cannot end within so many ms, end what does not.")
    ] = None,
    priority: Annotated[
        int, typer.Option(min=-PRIORITY_MAX, max=PRIORITY_MAX, help="Of requests that say none; higher goes first.")
    ] = 0,
    wait: Wait = True,
    timeout: Timeout = DEPLOY_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Run MODEL on the nodes there are, or change how it is run.

    Deploying a name again with other options re-plans it while it serves.
    """
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415
    from schemas.control import DeployRequest  # noqa: PLC0415

    settings = Settings(
        chunk_tokens=chunk,
        context_tokens=context,
        max_sequences=sequences,
        max_queued=queue,
        pipeline_depth=depth,
        batch_invariant=batch_invariant,
        recovery="fast" if fast_recovery else "identical",
    )
    placement = None if place is None else parse_placement(place)
    called = name or default_name(model)
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms, deadline_ms=deadline_ms, priority=priority)
    request = DeployRequest(
        name=called,
        model=model,
        settings=settings,
        stages=stages,
        placement=placement,
        slo=slo if slo != BEST_EFFORT else None,
        routes=routes,
        sensitive=kept_private(sensitive, private),
        sealed=sealed,
        on_demand=on_demand,
        cloud=parse_cloud(cloud, called, cloud_waits),
    )
    if not wait:
        reply = asyncio.run(control.deploy(Access(url, keys), request))
        if as_json:
            print_json(reply)
        else:
            what = "cold, as there is no room now; requests come in at" if reply.cold else "as of now"
            print(f"{called}: accepted; {what} {chains(reply.routes)}")
        return
    with readiness() as show:
        served = asyncio.run(control.deploy_and_wait(Access(url, keys), request, timeout, show))
    if as_json:
        print_json(served)
        return
    assert served.current is not None
    if served.current.cold:
        doors = ", ".join(served.current.nodes)
        what = "which have it loaded" if served.current.cloud is None else f"which {served.current.cloud.name} answers"
        print(f"{called}: {served.model_name} is cold, as there is no room; {doors} take requests, {what}")
    else:
        print(f"{called}: serving {served.model_name}, epoch {served.current.epoch}, {chains(served.current.chains)}")


def remove(
    name: Annotated[str, typer.Argument(help="The deployment to end.")],
    keys: Keys,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """End a deployment: what runs finishes, new requests are refused, then its blocks are unloaded."""
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    reply = asyncio.run(control.remove(Access(url, keys), DeploymentName(name)))
    if as_json:
        print_json(reply)
    else:
        print(f"{reply.name}: removed; it drains")


def parse_placement(text: str) -> Chain | Placement:
    """Stages from `n0:0-3,n1:4`, or a list of them from `n0:0-4|n1:0-4`; raises `ResplitError(INVALID_REQUEST)`."""
    chains = tuple(_parse_chain(part) for part in text.split("|"))
    return chains[0] if len(chains) == 1 else chains


def kept_private(sensitive: str | None, private: int | None) -> Sensitive | None:
    """What `--sensitive` or `--private` says; raises `ResplitError(INVALID_REQUEST)`."""
    if sensitive is not None and private is not None:
        message = f"--sensitive {sensitive} and --private {private} both say what stays on trusted nodes; give one"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "private")
    if private is not None:
        return f"ends:{private}" if private else "ends"
    return None if sensitive is None else parse_sensitive(sensitive)


def parse_sensitive(text: str) -> Sensitive:
    """`ends`, `ends:2`, `all`, or block numbers from `0,5`; raises `ResplitError(INVALID_REQUEST)`."""
    if text in ("ends", "ends:0"):
        return "ends"
    if text == "all" or re.fullmatch(r"ends:[1-9][0-9]{0,3}", text):
        return text
    if re.fullmatch(r"\d{1,6}(,\d{1,6})*", text) is None:
        message = f"{text!r} names no blocks: give `ends`, `ends:2`, `all`, or numbers such as 0,5,11"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "sensitive")
    return tuple(sorted({int(part) for part in text.split(",")}))


def parse_cloud(text: str | None, deployment: str, waits_s: float) -> Cloud | None:
    """`eu=big-1`, or `eu` where the model has the deployment's name there; raises `ResplitError(INVALID_REQUEST)`."""
    if text is None:
        return None
    name, _, model = text.partition("=")
    try:
        return Cloud(name=name, model=model or deployment, waits_s=waits_s)
    except ValidationError as error:
        raise ResplitError.from_validation(error, "cloud") from error


def _parse_chain(text: str) -> Chain:
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
