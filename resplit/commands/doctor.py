"""`resplit doctor`: what is wrong, and what to do about it."""

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.exits import Exit
from resplit.options import AsJson, OptionalKeys, Url
from resplit.output import print_json, spinner
from schemas.base import NodeId

if TYPE_CHECKING:
    from resplit.diagnosis import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    node: Annotated[str | None, typer.Argument(help="Only this node, its links and deployments.")] = None,
    url: Url = DEFAULT_URL,
    keys: OptionalKeys = None,
    as_json: AsJson = False,
) -> None:
    """Check the cluster, or NODE and what it is part of, and say what to do; with --keys this machine's keys as well.

    Ends with 1 if a check fails; a warning alone does not. Changes nothing.
    """
    from resplit.diagnosis import diagnose  # noqa: PLC0415
    from resplit.examine import examine  # noqa: PLC0415

    about = None if node is None else NodeId(node)
    with spinner("looking"):
        facts = asyncio.run(examine(url, None if keys is None else keys.expanduser(), about))
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
