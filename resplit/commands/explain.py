"""`resplit explain` and `resplit plan --dry-run`: why a deployment runs as it does, and what would be done now."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json, print_table
from resplit.view import chains
from schemas.base import DeploymentName
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from resplit.access import Access
    from resplit.standing import Seen
    from schemas.control import CandidateReport, DecisionReport, PipelineReport

COLUMNS = ["plan", "found as", "Phi", "TPOT ms", "TTFT ms", "move costs", "move s", "why not"]
ACTS = ("redistribute", "resplit", "routes", "hard")


def explain(
    keys: Keys,
    deployment: Annotated[str | None, typer.Argument(help="Which deployment; default: each.")] = None,
    url: Url = DEFAULT_URL,
    epoch: Annotated[int | None, typer.Option(min=1, help="Why this epoch's plan was made, from the events.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say why a deployment runs as it does, and why not otherwise.

    Phi is what a plan costs: 1 is the reference latency with nothing else to be said against it. What moving costs
    is in Phi x seconds. With --epoch the answer comes from the audit trail, so it is there for plans long gone.
    """
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    at = Access(url, keys)
    if epoch is not None:
        asyncio.run(_explain_epoch(at, deployment, epoch, as_json))
        return
    reply = asyncio.run(control.explain(at, None if deployment is None else DeploymentName(deployment)))
    if as_json:
        print_json(reply)
        return
    if not reply.decisions and not reply.pipelines:
        print("no deployment has a plan yet; see `resplit status`")
    for position, decision in enumerate(reply.decisions):
        if position:
            print()
        print(f"{decision.deployment}, epoch {decision.epoch}: {decision.plan_reason}")
        _print_decision(decision)
    for position, report in enumerate(reply.pipelines):
        if position or reply.decisions:
            print()
        _print_pipeline(report)


def plan(
    deployment: Annotated[str, typer.Argument(help="Which deployment.")],
    keys: Keys,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; the only way there is.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say what would be done about a deployment now: every candidate plan, its cost, and the decision."""
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    if not dry_run:
        message = "plans are made by the orchestrator; add --dry-run to see what it would do, or place with `deploy`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "dry_run")
    reply = asyncio.run(control.dry_run(Access(url, keys), DeploymentName(deployment)))
    if as_json:
        print_json(reply)
        return
    _print_decision(reply.decision)


def _print_decision(decision: "DecisionReport") -> None:
    print(decision.sentence)
    print()
    print_table("", COLUMNS, [_row(decision, one) for one in decision.candidates])
    certified = " (certain: no plan at all would repay a move)" if decision.certified else ""
    print(f"weighed at {decision.at.astimezone():%H:%M:%S}; no plan has less than Phi {decision.bound:.2f}{certified}")
    if decision.prediction is not None:
        print(f"predictions until now: {decision.prediction}")


def _print_pipeline(report: "PipelineReport") -> None:
    since = "" if report.at is None else f", {report.at.astimezone():%H:%M:%S}"
    print(f"{report.pipeline}: {report.sentence}{since}")
    if report.error is not None:
        print(f"as of now the services cannot be placed: {report.error.message} ({report.error.code})")
    print()
    print_table("", ["service", "nodes"], [[name, ", ".join(nodes) or "-"] for name, nodes in report.services.items()])
    print()
    rows = [
        [name, f"{task.per_s:.2f}", "-" if task.late is None else f"{task.late:.1%}", f"{task.owed:.1f}"]
        for name, task in report.tasks.items()
    ]
    print_table("", ["task", "requests/s", "expected late", "late beyond what may be"], rows)
    if report.strain > 1.0:
        print(
            f"more was late than the answers of services explain: they are taken for {report.strain:.2f} times slower"
        )


def _row(decision: "DecisionReport", candidate: "CandidateReport") -> list[str]:
    terms, move = candidate.terms, candidate.move
    current = candidate == decision.candidates[0]
    chosen = "stays" if current else "chosen"
    origin = candidate.origin if candidate.without is None else f"without {candidate.without}"
    return [
        chains(candidate.routes),
        origin,
        f"{candidate.phi:.2f}",
        f"{terms['tpot_ms']:.1f}" if "tpot_ms" in terms else "-",
        f"{terms['ttft_ms']:.1f}" if "ttft_ms" in terms else "-",
        "-" if move is None else f"{move['move_total']:.2f}",
        "-" if move is None else f"{move['move_seconds']:.1f}",
        candidate.why_not or chosen,
    ]


async def _explain_epoch(at: "Access", deployment: str | None, epoch: int, as_json: bool) -> None:
    from resplit.trail import READERS, follow_reader, read_trail  # noqa: PLC0415

    connection = await at.connect("resplit-explain", *READERS)
    try:
        read = await follow_reader(connection, at.credentials(*READERS), at.keys)
        trail = [read(data) async for data in read_trail(connection.jetstream(), follow=False)]
    finally:
        await connection.close()
    told = [seen for seen in trail if deployment is None or seen.event.deployment == deployment]
    made = [seen for seen in told if seen.event.kind == "plan_prepared" and seen.event.epoch == epoch]
    if not made:
        which = "any deployment" if deployment is None else repr(deployment)
        message = f"the events tell of no epoch {epoch} of {which}; `resplit events` has what there is"
        raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, message, "epoch")
    for seen in made:
        history = [one for one in told if one.event.deployment == seen.event.deployment]
        _print_epoch(seen, history, as_json)


def _print_epoch(made: "Seen", history: "list[Seen]", as_json: bool) -> None:
    """The event that announced the plan, the decision that led to it, and what became of it."""
    event = made.event
    before = history[: history.index(made)]
    decisions = [seen for seen in before if seen.event.kind == "decision" and seen.event.fields.get("action") in ACTS]
    caused = decisions[-1] if decisions and decisions[-1].event.fields.get("reason") == event.fields["reason"] else None
    ends = [
        seen
        for seen in history[history.index(made) :]
        if seen.event.epoch == event.epoch and seen.event.kind in ("plan_committed", "plan_aborted", "plan_retired")
    ]
    shown = [made, *([] if caused is None else [caused]), *ends]
    if as_json:
        print_json([{**seen.event.model_dump(mode="json"), "standing": seen.standing} for seen in shown])
        return
    at = event.at.astimezone().isoformat(sep=" ", timespec="seconds")
    print(f"{event.deployment}, epoch {event.epoch}, {at}: {event.fields['placement']}")
    print(event.fields["reason"])
    others = {} if caused is None else caused.event.fields
    for name in sorted(name for name in others if name.startswith("not_")):
        print(f"  not {others[name]}")
    for seen in ends:
        print(f"{seen.event.kind.removeprefix('plan_')}: {seen.event.fields['reason']}")
    if bad := sorted({seen.standing.upper() for seen in shown if seen.standing in ("forged", "late")}):
        print(f"({' and '.join(bad)} events)")
