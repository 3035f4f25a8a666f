"""`resplit events`: the audit trail, verified where a key folder is given."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import CONNECT_TIMEOUT_S, DEFAULT_URL
from resplit.options import AsJson, OptionalKeys, Url
from resplit.output import print_json

if TYPE_CHECKING:
    from resplit.trail import Seen, Trust

MARKS = {"verified": "", "unverified": "  [unverified]", "forged": "  [FORGED]"}


def events(
    url: Url = DEFAULT_URL,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep reading as events happen.")] = False,
    deployment: Annotated[str | None, typer.Option(help="Only events of this deployment.")] = None,
    keys: OptionalKeys = None,
    as_json: AsJson = False,
) -> None:
    """Print what was decided, applied, refused and failed, oldest first (with --json one line of JSON each)."""
    from resplit.trail import read_trust  # noqa: PLC0415

    trust = None if keys is None else read_trust(keys.expanduser())
    asyncio.run(_print_events(url, trust, follow, deployment, as_json))


async def _print_events(url: str, trust: "Trust | None", follow: bool, deployment: str | None, as_json: bool) -> None:
    from resplit.exchange import open_connection  # noqa: PLC0415
    from resplit.trail import read_event, read_trail  # noqa: PLC0415

    connection = await open_connection(url, "resplit-events", CONNECT_TIMEOUT_S, {})
    try:
        async for data in read_trail(connection.jetstream(), follow):
            seen = read_event(data, trust)
            if deployment is None or seen.event.deployment == deployment:
                if as_json:
                    print_json({**seen.event.model_dump(mode="json"), "signer": seen.signer, "standing": seen.standing})
                else:
                    print(_line(seen), flush=True)
    finally:
        await connection.close()


def _line(seen: "Seen") -> str:
    event = seen.event
    where = event.source if event.epoch is None else f"{event.source} {event.deployment}/{event.epoch}"
    if event.epoch is None and event.deployment is not None:
        where = f"{event.source} {event.deployment}"
    facts = " ".join(f"{name}={value}" for name, value in event.fields.items() if value is not None)
    request = "" if event.request is None else f" request={event.request}"
    at = event.at.astimezone().isoformat(sep=" ", timespec="milliseconds")
    return f"{at}  {event.kind:<22} {where:<20} {event.message}{request} {facts}".rstrip() + MARKS[seen.standing]
