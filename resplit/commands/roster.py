"""`resplit roster`: what the root of a cluster said, and who holds the root."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.commands.members import (
    EXPIRES_SOON,
    Cluster,
    Locked,
    Roots,
    ask_passphrase,
    certified_for,
    day,
    holders_of,
    now,
    read_given,
    say_changed,
)
from resplit.commands.policy import ModelRules, SensitiveRules, changed, lines
from resplit.defaults import DEFAULT_URL
from resplit.exits import Commands
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json, print_table
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from schemas.known import Known
    from schemas.roster import RootKeys

MEMBERS = ["member", "role", "tier", "until"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="What the root of a cluster said: show, renew, publish it, change its policy, or who holds the root.",
)


@app.command()
def show(cluster: Cluster, as_json: AsJson = False) -> None:
    """Who belongs to the cluster, and until when."""
    from bus.identity import read_roster  # noqa: PLC0415
    from bus.server_certificate import read_server_certificate  # noqa: PLC0415
    from schemas.roster import FORMER_MAX  # noqa: PLC0415

    roster = read_roster(cluster)
    if as_json:
        print_json(roster)
        return
    left = roster.expires_at - now()
    soon = "" if left > EXPIRES_SOON else "; renew it: resplit roster renew"
    print(f"cluster {roster.cluster}, roster {roster.version}, valid until {day(roster.expires_at)}{soon}")
    for line in lines(roster.policy):
        print(f"  {line}")
    if roster.former:
        last = roster.former[-1]
        newest = f"the last that of {last.name}, by roster {last.out}"
        print(f"  {len(roster.former)} former keys, of {FORMER_MAX} at most; {newest}")
    with suppress(ResplitError):  # a folder that only a roster was carried to is shown as well
        print(certified_for(read_server_certificate(cluster)))
    rows = [[member.name, member.role, member.tier or "", day(member.not_after)] for member in roster.members]
    print_table("", MEMBERS, rows)


@app.command()
def renew(cluster: Cluster, root: Roots = None, locked: Locked = False, as_json: AsJson = False) -> None:
    """Say the same again before the roster expires."""
    from bus.enrolment import renew as renewed  # noqa: PLC0415

    roster = renewed(cluster, holders_of(cluster, root, locked), now=now())
    say_changed(roster, cluster, "the roster is renewed", as_json)


@app.command()
def policy(
    cluster: Cluster,
    sensitive: SensitiveRules = None,
    model: ModelRules = None,
    root: Roots = None,
    locked: Locked = False,
    as_json: AsJson = False,
) -> None:
    """Change what no orchestrator can override, or show it. A rule takes the place of the one about the same name, and
    all others stay; `NAME=` takes it back."""
    from bus.enrolment import renew as renewed  # noqa: PLC0415
    from bus.identity import read_roster  # noqa: PLC0415

    before = read_roster(cluster).policy
    if sensitive is None and model is None:
        if as_json:
            print_json(before)
        else:
            print("\n".join(lines(before)) or "no rules: every deployment may run any model, on any node")
        return
    after = changed(before, sensitive or (), model or ())
    roster = renewed(cluster, holders_of(cluster, root, locked), now=now(), policy=after)
    say_changed(roster, cluster, "the policy is in force", as_json)


@app.command()
def holders(
    cluster: Cluster,
    add: Annotated[int, typer.Option(min=0, max=16, help="New holders to make.")] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(help="The key id of a holder who does not sign and stays, once for each.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="The root-N.key of a holder who signs and leaves, once for each.")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=1, max=16, help="How many sign from then on; default: as many as before.")
    ] = None,
    root: Roots = None,
    locked: Locked = False,
    as_json: AsJson = False,
) -> None:
    """Show who holds the root, or have others hold it: whoever signs stays, and who does not, and is not kept, is a
    holder no more. Where a key is lost: --add 1. Where one is in wrong hands: --out root-N.key --add 1."""
    from bus.cluster_folder import PENDING, open_cluster  # noqa: PLC0415
    from bus.holders import replace_holders  # noqa: PLC0415
    from schemas.signed import key_id  # noqa: PLC0415

    before = open_cluster(cluster).root
    if not add and keep is None and out is None and threshold is None:
        _say_root(before, as_json)
        return
    leaving = holders_of(cluster, out, locked) if out else []
    gone = {key_id(holder.signing.public_key()) for holder in leaving}
    # Where none is given those in the folder sign, and --out may name one of them.
    paths = sorted(cluster.glob("root-*.key")) if root is None else root
    given = holders_of(cluster, paths, locked) if paths else []
    remaining = [holder for holder in given if key_id(holder.signing.public_key()) not in gone]
    roster, files = replace_holders(
        cluster,
        [*remaining, *leaving],
        staying={key_id(holder.signing.public_key()) for holder in remaining} | set(keep or ()),
        added=add,
        threshold=before.threshold if threshold is None else threshold,
        passphrases=[ask_passphrase(f"new holder {number}", confirm=True) for number in range(add)] if locked else [],
        now=now(),
    )
    if as_json:
        pending = cluster / PENDING
        waits = str(pending) if pending.exists() else None
        print_json({"version": roster.version, "pending": waits, "files": [str(path) for path in files]})
        return
    after = {key_id(holder.signing.public_key()) for holder in remaining} | set(keep or ())
    for name in sorted(before.keys):
        print(f"{name} {'stays' if name in after else 'is out'}")
    for path in files:
        print(f"{path}: new; give it to its holder and delete it here")
    if len(after) + add == (before.threshold if threshold is None else threshold):
        print("every one of them must sign: if a single key is lost, nothing can be changed any more")
    say_changed(roster, cluster, f"version {before.version + 1} of the root is in force", as_json=False)


@app.command()
def sign(
    document: Annotated[Path, typer.Argument(help="The roster that another holder has signed (roster.pending).")],
    cluster: Cluster,
    root: Roots = None,
    locked: Locked = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Add a holder's signature to a roster, once its holder has read what it says."""
    from bus.holders import countersign_pending, review  # noqa: PLC0415
    from bus.remembered import PUBLIC, write_durably  # noqa: PLC0415

    data = read_given(document, "document")
    draft = review(data, cluster)
    rows = [[m.name, m.role, m.tier or "", day(m.not_after)] for m in draft.roster.members]
    print_table(f"roster {draft.roster.version}", MEMBERS, rows)
    for line in lines(draft.roster.policy):
        print(line)
    if draft.root != draft.before:
        print("the root changes hands:")
        _say_root(draft.root, as_json=False)
    if not yes:
        typer.confirm("Sign this?", abort=True)
    write_durably(document, countersign_pending(data, cluster, holders_of(cluster, root, locked)), PUBLIC)
    print(f"{document}: signed; once enough holders have: resplit roster adopt {document} --cluster {cluster}")


@app.command()
def adopt(
    document: Annotated[Path, typer.Argument(help="A roster that enough holders have signed.")],
    cluster: Cluster,
    as_json: AsJson = False,
) -> None:
    """Make a roster that enough holders have signed the cluster's."""
    from bus.holders import adopt as adopted  # noqa: PLC0415

    say_changed(adopted(cluster, read_given(document, "document")), cluster, "the roster is adopted", as_json)


@app.command()
def publish(cluster: Cluster, keys: Keys, url: Url = DEFAULT_URL) -> None:
    """Send the cluster's roster to every member that runs; those that start later find it."""
    import asyncio  # noqa: PLC0415

    from bus.folders import ROSTER, read_root  # noqa: PLC0415
    from bus.following import ask_for_roster, publish_roster  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415
    from schemas.known import held  # noqa: PLC0415

    first = read_root(cluster)
    data = read_given(cluster / ROSTER, "cluster")
    known, roster = held(first, data)

    async def sent() -> None:
        connection = await Access(url, keys).connect("resplit-roster", "operator")
        try:
            newest = await ask_for_roster(connection)
            if newest is not None and (there := _newer(known, newest)) is not None:
                message = (
                    f"the cluster has roster {there} already and {cluster} has {roster.version}; bring the newest "
                    "roster.signed into that folder"
                )
                raise ResplitError(ErrorCode.ROLLED_BACK, message, "cluster")
            await publish_roster(connection.jetstream(), data)
        finally:
            await connection.close()

    asyncio.run(sent())
    print(f"roster {roster.version} of cluster {roster.cluster} is published")


def _newer(known: "Known", data: bytes) -> int | None:
    """The version of the roster in `data`, where it follows the one that is known."""
    from schemas.known import held  # noqa: PLC0415

    try:
        after, roster = held(known, data)
    except ResplitError:
        return None
    return None if after == known else roster.version


def _say_root(root: "RootKeys", as_json: bool) -> None:
    """Who may sign."""
    if as_json:
        print_json(root)
        return
    print(f"root {root.version}: {root.threshold} of {len(root.keys)} holders sign, until {day(root.expires_at)}")
    for name in sorted(root.keys):
        print(f"  {name}")
