"""Options that commands share, each with one name, one environment variable and one default."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("~/.resplit/store")
DEFAULT_FOLDER = Path("~/.resplit/cluster")


def _missing(variable: str, member: str, other: str | None = None) -> Callable[[], Path]:
    """In the place of a default: keys that nobody named, but perhaps by another variable."""

    def refuse() -> Path:
        if other is not None and (named := os.environ.get(other)):
            return Path(named)
        made = DEFAULT_FOLDER / "keys" / member
        raise typer.BadParameter(
            f"say --keys FOLDER or set {variable}: a member's folder, made with `resplit join`; `resplit up` keeps "
            f"those of its own cluster, as {made}"
        )

    return refuse


def _server(url: str) -> str:
    for one in url.split(","):
        scheme, separator, _ = one.partition("://")
        if separator and scheme not in ("nats", "tls"):
            raise typer.BadParameter(f"{one} is no NATS server: it is said as nats://HOST:4222")
    return url


Url = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="RESPLIT_URL",
        help="The NATS server; of several that are one, all with commas between.",
        callback=_server,
    ),
]
StoreFolder = Annotated[
    Path, typer.Option("--store", envvar="RESPLIT_STORE", help="Folder with the models of this machine.")
]
Keys = Annotated[
    Path,
    typer.Option(
        "--keys",
        envvar="RESPLIT_KEYS",
        help="The folder of the member as whom to log in, made with `resplit join`.",
        default_factory=_missing("RESPLIT_KEYS", "operator"),
        show_default=False,
        callback=lambda path: path.expanduser(),
    ),
]
ClientKeys = Annotated[
    Path,
    typer.Option(
        "--keys",
        envvar="RESPLIT_CLIENT_KEYS",
        help="The folder of a member that was enrolled as a client, made with `resplit join`; else RESPLIT_KEYS.",
        default_factory=_missing("RESPLIT_CLIENT_KEYS", "client", "RESPLIT_KEYS"),
        show_default=False,
        callback=lambda path: path.expanduser(),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")]
Timeout = Annotated[float, typer.Option(min=1, help="Wait so many seconds at most.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every event, not just the remarkable.")]
