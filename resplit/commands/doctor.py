"""`resplit doctor`: what is wrong, and what to do about it."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.exits import Exit
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json, spinner
from schemas.base import NodeId

if TYPE_CHECKING:
    from resplit.diagnosis import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    keys: Keys,
    node: Annotated[str | None, typer.Argument(help="Only this node, its links and deployments.")] = None,
    url: Url = DEFAULT_URL,
    agent: Annotated[
        Path | None, typer.Option(help="The folder of this machine's agent: check its keys and its GPU as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the cluster, or NODE and what it is part of, and say what to do; with --agent this machine's agent as well.

    Ends with 1 if a check fails; a warning alone does not. Changes nothing.
    """
    from resplit.access import Access  # noqa: PLC0415
    from resplit.diagnosis import diagnose  # noqa: PLC0415
    from resplit.examine import examine  # noqa: PLC0415

    about = None if node is None else NodeId(node)
    with spinner("looking"):
        facts = asyncio.run(examine(Access(url, keys), None if agent is None else agent.expanduser(), about))
    findings = diagnose(facts, about)
    failed = sum(finding.verdict == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": findings})
    else:
        _print(findings)
    if failed:
        raise typer.Exit(Exit.FAILED)


def _print(findings: "Sequence[Finding]") -> None:
    """What fails comes last, where the eye is when the prompt is back."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in sorted(findings, key=lambda finding: list(STYLES).index(finding.verdict)):
        what = finding.check if finding.about is None else f"{finding.check} {finding.about}"
        said = finding.fact if finding.remedy is None else f"{finding.fact}\n→ {finding.remedy}"
        table.add_row(Text(finding.verdict, STYLES[finding.verdict]), Text(what), Text(said))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in STYLES}
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failing")
