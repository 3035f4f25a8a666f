"""The cluster as it is now, drawn anew at every look: nodes with their load, each plan as a strip of blocks.

`frame` is PURE: (what the orchestrator sees, since when it is silent) -> what is drawn.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from nats.errors import Error as NatsError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resplit.view import attained, chain, hosted, led, node_state, remarks, unheard
from schemas.control import DeploymentStatus, NodeStatus, StatusReply
from schemas.deployment import Stage
from schemas.errors import ResplitError
from schemas.plan import Plan

PALETTE = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
BLOCK = "█"
BAR_CELLS = 8

Ask = Callable[[], Awaitable[StatusReply]]


@dataclass(frozen=True)
class Look:
    """What was seen last, and why nothing newer was, if so."""

    at: datetime
    reply: StatusReply
    silence: str | None = None


async def looks(ask: Ask, interval_s: float) -> AsyncIterator[Look]:
    """One look every `interval_s`, for ever. Raises `ResplitError` only while there was none yet."""
    last: StatusReply | None = None
    while True:
        try:
            last = await ask()
            yield Look(datetime.now().astimezone(), last)
        except (ResplitError, NatsError) as error:
            if last is None:
                raise
            yield Look(datetime.now().astimezone(), last, str(error) or type(error).__name__)
        await asyncio.sleep(interval_s)


async def draw(ask: Ask, interval_s: float) -> None:
    """Draw every look in place on the terminal until cancelled."""
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        async for look in looks(ask, interval_s):
            live.update(frame(look), refresh=True)


async def list_looks(ask: Ask, interval_s: float, show: Callable[[StatusReply], None]) -> None:
    """Print every look below the one before, without control codes, until cancelled; silence goes to stderr."""
    async for look in looks(ask, interval_s):
        if look.silence is None:
            show(look.reply)
            sys.stdout.flush()
        else:
            print(f"{look.at:%H:%M:%S}  no answer: {look.silence}", file=sys.stderr, flush=True)


def frame(look: Look) -> RenderableType:
    """Everything that is drawn of one look."""
    reply = look.reply
    colours = colours_of(reply)
    head = Text(f"{look.at:%H:%M:%S}  {len(reply.nodes)} node(s)  {led(reply)}")
    if look.silence is not None:
        head.append(f"  no answer: {look.silence}; below is what was seen last", "bold red")
    parts: list[RenderableType] = [head, Text(), _nodes(reply, colours)]
    if missing := unheard(reply):
        parts.append(Text(f"drained and not here: {', '.join(missing)}", "dim"))
    for found in reply.deployments:
        parts += [Text(), _headline(found), _plans(found, colours)]
        if said := remarks(found):
            parts.append(Text(f"  {said}", "yellow" if found.state in ("degraded", "waiting") else "dim"))
    if not reply.deployments:
        parts += [Text(), Text("nothing is deployed; start with `resplit deploy MODEL`", "dim")]
    return Group(*parts)


def colours_of(reply: StatusReply) -> dict[str, str]:
    """A colour for each node that is here or in a plan, the same at every look while the nodes are the same."""
    names: set[str] = {node.capacity.node for node in reply.nodes}
    for found in reply.deployments:
        for plan in (found.current, found.candidate, *found.draining):
            names.update(plan.nodes if plan is not None else ())
    return {name: PALETTE[position % len(PALETTE)] for position, name in enumerate(sorted(names))}


def strip(stages: tuple[Stage, ...], colours: Mapping[str, str]) -> Text:
    """A cell for each block in the colour of its node."""
    return Text.assemble(*((BLOCK * len(stage.blocks), colours[stage.node]) for stage in stages))


def _nodes(reply: StatusReply, colours: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("node", "state", "load", "memory", "links", "blocks"):
        table.add_column(column, overflow="fold")
    for node in reply.nodes:
        capacity = node.capacity
        used = 1 - capacity.memory_free_bytes / max(1, capacity.memory_total_bytes)
        state = node_state(node, reply.drained)
        table.add_row(
            Text(capacity.node, colours[capacity.node]),
            Text(state if node.lost else f"{state}, {node.age_s:.0f} s", "bold red" if node.lost else ""),
            _bar(capacity.load),
            _bar(used),
            Text(_links(node)),
            Text(hosted(node) or "-"),
        )
    return table


def _bar(share: float) -> Text:
    share = min(1.0, max(0.0, share))
    full = round(share * BAR_CELLS)
    colour = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text.assemble((BLOCK * full, colour), ("·" * (BAR_CELLS - full), "dim"), f" {100 * share:3.0f} %")


def _links(node: NodeStatus) -> str:
    return ", ".join(
        f"{link.peer} {link.rtt_ms:.1f} ms" + ("" if link.direct else " (bus)") for link in node.capacity.links
    )


def _headline(found: DeploymentStatus) -> Text:
    colour = {"serving": "green", "degraded": "bold red", "waiting": "bold red"}.get(found.state, "yellow")
    line = Text.assemble((found.name, "bold"), f"  {found.model_name or '-'}  ", (found.state, colour))
    predicted = found.estimate or {}
    for term, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
        if term in predicted:
            line.append(f"  {name} {predicted[term]:.1f} ms predicted")
            if (error := (found.prediction_error or {}).get(f"{name.lower()}_error")) is not None:
                line.append(f" ({error:.0%} off lately)", "dim")
    if found.attainment is not None:
        line.append(f"  SLO met {attained(found)}")
    return line


def _plans(found: DeploymentStatus, colours: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    shown: list[tuple[str, Plan, str]] = []
    if found.current is not None:
        shown.append(("serves", found.current, f"{len(found.applied)} of {len(found.current.nodes)} confirmed"))
    if found.candidate is not None:
        shown.append(("prepares", found.candidate, f"{len(found.ready)} of {len(found.candidate.nodes)} ready"))
    shown += [("drains", plan, "") for plan in found.draining]
    for what, plan, standing in shown:
        for route in plan.routes:
            table.add_row(
                f"  {what} {plan.epoch}", strip(route.stages, colours), Text(chain(route.stages)), Text(standing, "dim")
            )
    return table
