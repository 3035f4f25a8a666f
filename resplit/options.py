"""Options that commands share, each with one name, one environment variable and one default."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("~/.resplit/store")
DEFAULT_FOLDER = Path("~/.resplit/cluster")

Url = Annotated[str, typer.Option("--url", envvar="RESPLIT_URL", help="The NATS server.")]
StoreFolder = Annotated[
    Path, typer.Option("--store", envvar="RESPLIT_STORE", help="Folder with the models of this machine.")
]
Keys = Annotated[
    Path,
    typer.Option(
        "--keys",
        envvar="RESPLIT_KEYS",
        help="The folder of the member as whom to log in, made with `resplit join`.",
        callback=lambda path: path.expanduser(),
    ),
]
ClientKeys = Annotated[
    Path,
    typer.Option(
        "--keys",
        envvar=["RESPLIT_CLIENT_KEYS", "RESPLIT_KEYS"],
        help="The folder of a member that was enrolled as a client, made with `resplit join`.",
        callback=lambda path: path.expanduser(),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")]
Timeout = Annotated[float, typer.Option(min=1, help="Wait so many seconds at most.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every event, not just the remarkable.")]
