"""`resplit install-service`: a service of this machine, put in place as often as one likes."""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from resplit.commands.members import now, read_given
from resplit.defaults import DEFAULT_URL
from resplit.options import Url
from resplit.units import (
    NATS_USER,
    SOCKET,
    STATE,
    TEMPLATES,
    USER,
    USERS,
    Given,
    Join,
    Run,
    Service,
    ServiceRole,
    Write,
    option_words,
    service,
    shown,
    steps,
)
from schemas.errors import ErrorCode, ResplitError

BOOTED = Path("/run/systemd/system")
"""Is there where systemd started the machine (sd_booted)."""


def install_service(
    role: Annotated[ServiceRole, typer.Argument(help="What is to run here.")],
    name: Annotated[str | None, typer.Argument(help="An agent's name in the roster.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="What `resplit enroll` wrote for it; a gateway's is a client's. Joined here.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="An observer's bundle, for a gateway that shows the cluster.")
    ] = None,
    server: Annotated[
        Path | None, typer.Option(help="The folder of a NATS server's files, of `resplit init` or `resplit servers`.")
    ] = None,
    url: Url = DEFAULT_URL,
    options: Annotated[str, typer.Option(help="What else the service is told, as `--listen 10.0.0.11:7410`.")] = "",
    start: Annotated[bool, typer.Option("--now", help="Start it, now and whenever the machine starts.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Write files anew that you changed; those as they were end in .old.")
    ] = False,
    root: Annotated[
        Path, typer.Option(help="Write below this folder, as into an image, and tell systemd nothing.")
    ] = Path("/"),
    prefix: Annotated[
        Path | None, typer.Option(help="Where Resplit is installed; default: where this program is.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be written and run.")] = False,
) -> None:
    """Put a service in place: its user, its unit of systemd, its settings and its member's folder. Again changes only
    what is to be otherwise."""
    wanted, live = service(role, name), root == Path("/")
    _check_fits(wanted, bundle, watch, server, options)
    if start and not live:
        message = "--now is for the machine that runs; enable the unit in the image with `systemctl --root`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "now")
    given = Given(
        template=_shipped(TEMPLATES[role]),
        users=_shipped(USERS),
        socket=_shipped(SOCKET),
        programs=_programs(prefix),
        nats_server=_nats_server(prefix) if role == "nats" else _programs(prefix) / "nats-server",
        url=url,
        options=options,
        bundle=None if bundle is None else read_given(bundle, "bundle"),
        watch=None if watch is None else read_given(watch, "watch"),
        server_files={} if server is None else _server_files(server.expanduser()),
    )
    found = steps(wanted, given, live=live, start=start)
    if dry_run:
        print(shown(found), end="")
        return
    if live:
        _check_live()
    for step in found:
        match step:
            case Write():
                print(_written(step, root, live, replace))
            case Join():
                print(_joined(step, root, live))
            case Run(command):
                _run(command)
    _say_next(wanted, root, live, start)


def _check_fits(wanted: Service, bundle: Path | None, watch: Path | None, server: Path | None, options: str) -> None:
    """That options are those of the role, and what the service is told is what its command knows."""
    for field, value, fits, remedy in (
        ("bundle", bundle, wanted.role != "nats", "a NATS server has no bundle; its files come with --server"),
        ("watch", watch, wanted.role == "gateway", "only a gateway shows the cluster; leave --watch out"),
        ("server", server, wanted.role == "nats", "only `nats` has a server's files; leave --server out"),
        ("options", options or None, wanted.role != "nats", "a NATS server is told what it is by its configuration"),
    ):
        if value is not None and not fits:
            raise ResplitError(ErrorCode.INVALID_REQUEST, remedy, field)
    if options:
        _check_options(wanted, option_words(options))


def _check_options(wanted: Service, words: list[str]) -> None:
    from resplit.cli import app  # noqa: PLC0415

    command: Any = typer.main.get_command(app)
    found = command.commands.get(wanted.role)
    arguments = [*filter(None, (wanted.name,)), "--keys", str(wanted.keys), *words]
    if found is not None:
        found.make_context(wanted.role, arguments)  # raises a usage error for what the command does not know


def _check_live() -> None:
    if os.geteuid() != 0:
        message = "this writes into /etc and /var/lib; run it as root (sudo), or see what it would do with --dry-run"
        raise ResplitError(ErrorCode.FORBIDDEN, message)
    if not BOOTED.is_dir() or shutil.which("systemctl") is None:
        message = "systemd did not start this machine; with --root DIR the files are written for one that it starts"
        raise ResplitError(ErrorCode.MISSING_DEPENDENCY, message)


def _shipped(name: str) -> str:
    return (resources.files("deploy") / "systemd" / name).read_text()


def _programs(prefix: Path | None) -> PurePosixPath:
    return PurePosixPath(Path(sys.executable).parent if prefix is None else prefix / "bin")


def _nats_server(prefix: Path | None) -> PurePosixPath:
    from resplit.server import nats_program  # noqa: PLC0415

    return PurePosixPath(nats_program() if prefix is None else prefix / "bin" / "nats-server")


def _server_files(folder: Path) -> dict[str, bytes]:
    from bus.cluster_folder import LEAF_SEED  # noqa: PLC0415
    from bus.natsconf import LOGINS_FILE, SERVER_FILE  # noqa: PLC0415
    from bus.server_certificate import SERVER_CERTIFICATE, SERVER_KEY  # noqa: PLC0415
    from natstls.contexts import AUTHORITY  # noqa: PLC0415

    needed = [SERVER_FILE, LOGINS_FILE, AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY]
    needed += [LEAF_SEED] if (folder / LEAF_SEED).exists() else []
    return {name: read_given(folder / name, "server") for name in needed}


def _written(step: Write, root: Path, live: bool, replace: bool) -> str:
    """Write a file unless it is there as it should be, or somebody changed it; what became of it."""
    from bus.remembered import write_durably  # noqa: PLC0415

    path = _below(root, step.path)
    before = path.read_bytes() if path.exists() else None
    if before == step.content:
        told = f"{path}: as it was"
    elif before is not None and step.is_yours and not replace:
        was, asked = (one.decode(errors="replace").splitlines() for one in (before, step.content))
        changes = [line for line in difflib.ndiff(was, asked) if line.startswith(("- ", "+ "))]
        differs = "\n".join(f"    {line}" for line in changes)
        return f"{path}: KEPT as it is, which differs from what was asked for (--replace writes it anew):\n{differs}"
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = f"{path}: written"
        if before is not None and step.is_yours:
            path.rename(path.with_name(f"{path.name}.old"))
            told = f"{path}: written anew; as it was it is {path.name}.old"
        write_durably(path, step.content, step.mode)
    path.chmod(step.mode)
    if step.group is not None and live:
        shutil.chown(path, "root", step.group)
    return told


def _joined(step: Join, root: Path, live: bool) -> str:
    """Put a member's folder in place, if the bundle is of whom it should be."""
    from bus.joining import join  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as tried:
        member = join(step.bundle, Path(tried) / "keys", now()).member
    if member.role != step.role or step.name not in (None, member.name):
        wanted = f"the {step.role} {step.name}" if step.name is not None else f"a member of the role {step.role}"
        message = f"the bundle is of the {member.role} {member.name!r}, and this service runs as {wanted}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "bundle")
    folder = _below(root, step.folder)
    _below(root, STATE).mkdir(parents=True, exist_ok=True)
    join(step.bundle, folder, now())
    folder.chmod(0o700)
    if live:  # in an image systemd does that, when the service is first started
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, USER, USER)
    return f"{folder}: {member.role} {member.name}, until {member.not_after:%Y-%m-%d}; delete the bundle now"


def _run(command: tuple[str, ...]) -> None:
    print(" ".join(command))
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        message = f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}"
        raise ResplitError(ErrorCode.INTERNAL, message)


def _say_next(wanted: Service, root: Path, live: bool, start: bool) -> None:
    if wanted.role != "nats" and not _below(root, wanted.keys / "known.json").exists():
        print(f"next: its member's folder is missing; again with --bundle, or resplit join BUNDLE --keys {wanted.keys}")
    elif not start:
        print(f"next: systemctl enable --now {wanted.unit}")
    elif live:
        print(
            f"next: systemctl status {wanted.unit}   (a unit that ran already goes on as it was until it is restarted)"
        )
    if wanted.role == "nats" and not live:
        print(f"next: chown root:{NATS_USER} {_below(root, Path('/etc/resplit/nats'))}/*.key in the image")


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")
