"""The command `resplit`: every command by its name. What a command needs is imported when it runs."""

import sys

import typer

from resplit.commands import (
    audit,
    demo,
    deployments,
    doctor,
    events,
    explain,
    gateway,
    infer,
    members,
    models,
    nodes,
    roster,
    serve,
    servers,
    services,
    simulate,
    status,
    topology,
)
from resplit.exits import EPILOG, Commands

SERVE, KEEP, ASK, CARE = "Run", "Who belongs", "Use", "Look after"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Run one large model across several small machines, and keep it fast while they change.",
)
app.command(rich_help_panel=SERVE)(serve.up)
app.command(rich_help_panel=SERVE)(serve.agent)
app.command(rich_help_panel=SERVE)(serve.orchestrator)
app.command(rich_help_panel=SERVE)(gateway.gateway)
app.command(rich_help_panel=SERVE)(gateway.api_key)
app.command(rich_help_panel=SERVE)(services.install_service)
app.command(rich_help_panel=KEEP)(members.init)
app.command(rich_help_panel=KEEP)(members.enroll)
app.command(rich_help_panel=KEEP)(members.join)
app.command(rich_help_panel=KEEP)(members.rotate)
app.command(rich_help_panel=KEEP)(members.revoke)
app.command(rich_help_panel=KEEP)(members.certify)
app.command(rich_help_panel=KEEP)(servers.servers)
app.command(rich_help_panel=KEEP)(servers.leaf)
app.add_typer(roster.app, name="roster", rich_help_panel=KEEP)
app.add_typer(models.app, name="models", rich_help_panel=ASK)
app.command(rich_help_panel=ASK)(deployments.deploy)
app.command(rich_help_panel=ASK)(deployments.remove)
app.command(rich_help_panel=ASK)(status.status)
app.command(rich_help_panel=ASK)(explain.explain)
app.command(rich_help_panel=ASK)(explain.plan)
app.command(rich_help_panel=ASK)(infer.infer)
app.command(rich_help_panel=ASK)(events.events)
app.add_typer(audit.app, name="audit", rich_help_panel=CARE)
app.command(rich_help_panel=CARE)(doctor.doctor)
app.command(rich_help_panel=CARE)(nodes.drain)
app.command(rich_help_panel=CARE)(nodes.undrain)
app.command(rich_help_panel=CARE)(nodes.trust)
app.command(rich_help_panel=CARE)(nodes.distrust)
app.add_typer(topology.app, name="topology", rich_help_panel=CARE)
app.command(rich_help_panel=ASK)(demo.demo)
app.command(rich_help_panel=ASK)(simulate.simulate)


def main() -> None:
    """The console script: runs one command and exits with one of `resplit.exits.Exit`."""
    app(prog_name="resplit", args=sys.argv[1:])
