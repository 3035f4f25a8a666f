"""`resplit audit`: whether the audit trail is whole, and the trail as a file."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, TypeVar

import typer

from resplit.defaults import DEFAULT_URL
from resplit.exits import Exit
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json, print_table
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from resplit.access import Access
    from resplit.chain import Finding, Verifier
    from schemas.audit import AuditEvent

app = typer.Typer(no_args_is_help=True, help="Prove that the audit trail is whole, or keep it elsewhere.")

VerifyKeys = Annotated[
    Path,
    typer.Option(
        "--keys",
        envvar="RESPLIT_KEYS",
        help="The folder of a member to verify with, and as whom to log in; for files, the cluster's serves as well.",
        callback=lambda path: path.expanduser(),
    ),
]

T = TypeVar("T")
HOLDERS = ["node", "deployment", "epoch", "model", "blocks", "since", "until"]


@app.command()
def verify(
    keys: VerifyKeys,
    url: Url = DEFAULT_URL,
    file: Annotated[
        list[Path] | None, typer.Option("--file", help="Read this export instead; several in their order.")
    ] = None,
    and_stream: Annotated[
        bool, typer.Option("--and-stream", help="The exports first, and then the stream that goes on behind them.")
    ] = False,
    known: Annotated[
        Path | None,
        typer.Option(help="Hold the trail against the checkpoints kept here, and keep the newest ones if all is well."),
    ] = None,
    holders: Annotated[bool, typer.Option("--holders", help="Also say who held which blocks when.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove order and completeness of the audit trail: every writer's chain, checkpoints, what writers saw of others.

    One line for each thing found. Ends with 1 if anything was found that its writers did not declare.
    """
    from resplit.access import Access  # noqa: PLC0415
    from resplit.chain import Kept, Verifier  # noqa: PLC0415
    from resplit.trail import read_trust  # noqa: PLC0415
    from schemas.codec import decode, encode  # noqa: PLC0415

    trust = read_trust(keys)
    kept = known.read_bytes().splitlines() if known is not None and known.exists() else []
    verifier = Verifier(trust, [decode(Kept, line, str(known)) for line in kept])
    events = asyncio.run(_judge(verifier, Access(url, keys), file or [], and_stream or not file, as_json))
    verdict = verifier.verdict()
    if holders:
        _print_holders(events, as_json)
    if as_json:
        print_json({"summary": verdict, "sound": verdict.is_sound})
    else:
        writers = len({life.writer for life in verdict.lives})
        if not verdict.is_sound:
            print(f"members are those of the roster in {keys}; if it is not the newest, bring that there and ask again")
        said = "sound" if verdict.is_sound else "NOT SOUND"
        print(
            f"{said}: {verdict.events} events, {writers} writers, {len(verdict.lives)} lives; "
            f"{verdict.undeclared} undeclared, {verdict.declared} declared"
            + ("; every signature verified" if verdict.is_sound else "")
        )
    if not verdict.is_sound:
        raise typer.Exit(Exit.FAILED)
    if known is not None:
        partial = known.with_name(f".{known.name}.part")
        partial.write_bytes(b"".join(encode(one) + b"\n" for one in verdict.kept))
        partial.replace(known)


@app.command()
def export(
    keys: Keys,
    file: Annotated[Path | None, typer.Argument(help="A file that does not exist yet; default: stdout.")] = None,
    url: Url = DEFAULT_URL,
    roll: Annotated[
        bool,
        typer.Option(
            "--roll",
            help="Then begin the stream anew, with an archivist's keys: the file is all that is left of it.",
        ),
    ] = False,
) -> None:
    """Write the audit trail as JSON Lines with CloudEvents attributes, oldest first; `verify --file` reads them.

    After --roll, keep every file: `verify --file FIRST --file SECOND --and-stream` proves that it is one trail.
    """
    from resplit.access import Access  # noqa: PLC0415
    from resplit.rolling import begin_anew, seal_trail  # noqa: PLC0415

    at = Access(url, keys)
    if file is None:
        if roll:
            message = "name the file that is to hold what is removed from the stream"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file")
        count = asyncio.run(_write(at, sys.stdout))
    elif file.exists():
        message = f"{file} is there already; an export may be all that is left of a trail, so name another file"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file")
    else:
        config = asyncio.run(_on_server(at, seal_trail)) if roll else None
        count = _export(at, file)
        if config is not None:
            asyncio.run(_on_server(at, lambda js: begin_anew(js, config, count)))
    print(f"{count} events exported", file=sys.stderr)


@app.command()
def spread(keys: Keys, url: Url = DEFAULT_URL) -> None:
    """Have the trail kept by as many NATS servers as the cluster has, with an archivist's keys.

    A trail that was begun on several servers is; one of an earlier release, or of a time with one server, is not.
    """
    from bus.replicas import spread as spread_stream  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415
    from schemas import subjects  # noqa: PLC0415

    count = asyncio.run(_on_server(Access(url, keys), lambda js: spread_stream(js, subjects.STREAM_AUDIT)))
    print(f"the trail is kept {'once' if count == 1 else f'{count} times'}")


def _export(at: "Access", file: Path) -> int:
    """Write the trail into `file`, which then has all of it, on the disk, or is not there."""
    partial = file.with_name(f".{file.name}.part")
    try:
        with partial.open("w", encoding="utf-8") as out:
            count = asyncio.run(_write(at, out))
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)
    except OSError as error:
        message = f"the export could not be written: {error}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


async def _write(at: "Access", out: TextIO) -> int:
    from resplit.cloudevents import as_line  # noqa: PLC0415

    count = 0
    async with aclosing(_stream(at)) as envelopes:
        async for data in envelopes:
            out.write(as_line(data) + "\n")
            count += 1
    return count


async def _judge(
    verifier: "Verifier", at: "Access", files: list[Path], and_stream: bool, as_json: bool
) -> "list[AuditEvent]":
    """Take everything, say what is found as it is found; the events that tell of plans."""
    events: list[AuditEvent] = []
    for path in files:
        for data in _exported(path):
            _say(verifier.take(data), as_json)
            _keep(verifier.last, events)
    if and_stream:
        async with aclosing(_stream(at)) as envelopes:
            async for data in envelopes:
                _say(verifier.take(data), as_json)
                _keep(verifier.last, events)
    _say(verifier.end(), as_json)
    return events


def _keep(event: "AuditEvent | None", events: "list[AuditEvent]") -> None:
    if event is not None and event.kind.startswith(("plan_", "deployment_")):
        events.append(event)


async def _stream(at: "Access") -> AsyncGenerator[bytes, None]:
    from resplit.trail import READERS, read_trail  # noqa: PLC0415

    connection = await at.connect("resplit-audit", *READERS)
    try:
        async for data in read_trail(connection.jetstream(), follow=False):
            yield data
    finally:
        await connection.close()


async def _on_server(at: "Access", act: "Callable[[JetStreamContext], Awaitable[T]]") -> T:
    connection = await at.connect("resplit-audit", "archivist")
    try:
        return await act(connection.jetstream())
    finally:
        await connection.close()


def _exported(path: Path) -> Iterator[bytes]:
    from resplit.cloudevents import LINE_CHARS_MAX, envelopes  # noqa: PLC0415

    try:
        with path.open(encoding="utf-8", errors="strict") as lines:
            yield from envelopes(iter(lambda: lines.readline(LINE_CHARS_MAX), ""))
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {path}: {error}; name a file that `resplit audit export` wrote"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file") from error


def _say(findings: "Sequence[Finding]", as_json: bool) -> None:
    for finding in findings:
        if as_json:
            print_json({**finding.__dict__, "declared": finding.is_declared})
            continue
        where = " ".join(filter(None, [finding.life or finding.writer, str(finding.number or "")]))
        line = f"{'declared' if finding.is_declared else 'FAULT':<9} {finding.flaw:<16} {where}: {finding.sentence}"
        # Some of the words may be a stranger's: they must neither break the line nor speak to the terminal.
        print("".join(c if c.isprintable() else " " for c in line), flush=True)


def _print_holders(events: "list[AuditEvent]", as_json: bool) -> None:
    from resplit.holders import holders  # noqa: PLC0415

    found = holders(events)
    if as_json:
        print_json([{**asdict(one), "since": _iso(one.since), "until": _iso(one.until)} for one in found])
        return
    rows = [
        [
            holding.node,
            holding.deployment,
            str(holding.epoch),
            (holding.model or "?")[:12],
            holding.blocks or "?",
            _iso(holding.since) or "",
            _iso(holding.until) or "",
        ]
        for holding in found
    ]
    print_table("", HOLDERS, rows)


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone().isoformat(timespec="seconds")
