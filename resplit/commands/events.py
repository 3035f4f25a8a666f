"""`resplit events`: the audit trail, verified."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json
from resplit.view import REASONS

if TYPE_CHECKING:
    from resplit.access import Access
    from resplit.standing import Seen

MARKS = {"verified": "", "unverified": "  [unverified]", "late": "  [LATE]", "forged": "  [FORGED]"}


def events(
    keys: Keys,
    url: Url = DEFAULT_URL,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep reading as events happen.")] = False,
    deployment: Annotated[str | None, typer.Option(help="Only events of this deployment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what was decided, applied, refused and failed, oldest first (with --json one line of JSON each).

    Every event is verified, by the newest roster that the folder or the bus has: `[FORGED]` marks one that its source
    did not sign, `[LATE]` one that is signed with a key behind the word that a roster took it out (the member was
    revoked, or got new keys).
    """
    from resplit.access import Access  # noqa: PLC0415

    asyncio.run(_print_events(Access(url, keys), follow, deployment, as_json))


async def _print_events(at: "Access", follow: bool, deployment: str | None, as_json: bool) -> None:
    from resplit.trail import READERS, follow_reader, read_trail  # noqa: PLC0415

    connection = await at.connect("resplit-events", *READERS)
    try:
        read = await follow_reader(connection, at.credentials(*READERS), at.keys)
        async for data in read_trail(connection.jetstream(), follow):
            seen = read(data)
            if deployment is None or seen.event.deployment == deployment:
                if as_json:
                    print_json({**seen.event.model_dump(mode="json"), "signer": seen.signer, "standing": seen.standing})
                else:
                    print(event_line(seen), flush=True)
    finally:
        await connection.close()


def event_line(seen: "Seen") -> str:
    """One line: when, who says it, what it is about, what happened, why, and every other fact by its name."""
    event = seen.event
    about = event.deployment or ""
    if event.epoch is not None:
        about += f"/{event.epoch}"
    why = next((name for name in REASONS if event.fields.get(name)), None)
    reason = "" if why is None else f": {event.fields[why]}"
    others = {name: value for name, value in event.fields.items() if value is not None and name != why}
    if event.request is not None:
        others = {"request": event.request, **others}
    facts = "".join(f"  {name}={value}" for name, value in others.items())
    at = event.at.astimezone().isoformat(sep=" ", timespec="milliseconds")
    line = f"{at}  {event.source:<12}  {event.kind:<21}  {about:<14}  {event.message}{reason}{facts}"
    # Some of the words are a stranger's: they must neither break the line nor speak to the terminal.
    return "".join(c if c.isprintable() else " " for c in line).rstrip() + MARKS[seen.standing]
