"""`resplit demo`: see it work, on this machine, in half a minute."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from resplit.exits import Exit
from resplit.options import AsJson, Verbose
from resplit.output import print_json


def demo(
    agents: Annotated[int, typer.Option(min=1, help="How many agents to cut the model over.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="How many sums to ask at once.")] = 24,
    seed: Annotated[int, typer.Option(help="Decides which sums.")] = 1,
    store: Annotated[Path | None, typer.Option(help="A store with another `adder` than the one shipped.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Cut a small model over several agents on this machine and check that it answers like the uncut one.

    Ends with 0 only if every answer is the uncut model's, token for token.
    """
    from resplit.demo import run_demo, shipped_store  # noqa: PLC0415
    from resplit.demo_report import document, print_report  # noqa: PLC0415
    from resplit.running import log_to_stderr  # noqa: PLC0415

    log_to_stderr(logging.INFO if verbose else logging.ERROR)
    say = (lambda _: None) if as_json else _say
    models = shipped_store() if store is None else store.expanduser()
    outcome = asyncio.run(run_demo(models, agents, requests, seed, say))
    if as_json:
        print_json(document(outcome))
    else:
        print_report(outcome)
    if not outcome.all_well:
        raise typer.Exit(Exit.FAILED)


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)
