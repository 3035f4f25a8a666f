"""Services of a machine: the units that ship, and how `resplit install-service` puts them in place."""

import re
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bus.enrolment import enrol
from bus.founding import found_cluster, load_holder
from bus.identity import load_identity
from resplit.cli import app
from resplit.commands import services
from resplit.exits import Exit
from resplit.units import PROGRAMS, SOCKET, TEMPLATES, Given, Join, Run, Write, rendered, service, steps
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import Role, TrustTier

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
EXPOSURE = 2.5
"""The most that `systemd-analyze security` may say, of 10."""
PREFIX = ("--prefix", "/opt/resplit")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def shipped(name: str) -> str:
    return (UNITS / name).read_text()


@pytest.fixture(params=sorted(TEMPLATES.values()))
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One of them, of an agent the instance n0, with a program that this machine has."""
    text = shipped(request.param)
    assert f"ExecStart={PROGRAMS}/" in text
    path = tmp_path / str(request.param).replace("@.", "@n0.")
    path.write_text(re.sub(rf"{PROGRAMS}/[\w-]+", "/bin/true", text))
    (tmp_path / SOCKET).write_text(shipped(SOCKET))  # beside it, as it will be
    return path


def analyze(*arguments: str | Path) -> str:
    """What systemd-analyze says of a unit that it accepts."""
    done = subprocess.run(["systemd-analyze", *arguments], check=False, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@needs_systemd
def test_systemd_has_nothing_to_say_about_a_unit(unit: Path) -> None:
    assert analyze("verify", "--man=no", unit) == ""


@needs_systemd
def test_systemd_reads_every_line_of_a_unit(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("[Service]\n", "[Service]\nWatchdogSeconds=30\n"))
    assert "'WatchdogSeconds' in section" in analyze("verify", "--man=no", unit)


@needs_systemd
def test_a_unit_may_do_little(unit: Path) -> None:
    said = analyze("security", "--offline=true", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for .*: ([\d.]+)", said)
    assert exposure is not None, said
    assert float(exposure[1]) <= EXPOSURE


@needs_systemd
def test_the_agent_reaches_no_device_but_nvidias(tmp_path: Path) -> None:
    path = tmp_path / "resplit-agent@n0.service"
    path.write_text(shipped(TEMPLATES["agent"]).replace(f"{PROGRAMS}/resplit", "/bin/true"))
    said = analyze("security", "--offline=true", "--no-pager", path)
    [devices] = [line for line in said.splitlines() if "DeviceAllow=" in line]
    assert set(re.findall(r"char-[\w*-]+:\w+|/dev/\S+", devices)) == {
        "char-rtc:r",
        "char-nvidia*:rw",
    }  # rtc: ProtectClock


@pytest.mark.parametrize("role", ["agent", "orchestrator", "gateway"])
def test_what_tells_systemd_that_it_lives_is_waited_for_and_watched(role: Any) -> None:
    text = shipped(TEMPLATES[role])
    assert "Type=notify\n" in text and re.search(r"^WatchdogSec=\d+$", text, re.MULTILINE)
    assert re.search(r"^Restart=always$", text, re.MULTILINE)


def test_a_service_sees_the_folders_that_it_is_given_and_no_others() -> None:
    for role in ("agent", "orchestrator", "gateway"):
        text = shipped(TEMPLATES[role])
        [kept] = re.findall(r"^StateDirectory=(.*)$", text, re.MULTILINE)
        [seen] = re.findall(r"^BindPaths=(.*)$", text, re.MULTILINE)
        assert [f"%S/{folder}" for folder in kept.split()] == seen.split()
        assert "TemporaryFileSystem=%S/resplit:ro\n" in text and "StateDirectoryMode=0700\n" in text


def test_a_unit_is_the_one_that_ships_but_for_where_the_program_is() -> None:
    for name in TEMPLATES.values():
        text = shipped(name)
        assert rendered(text, PROGRAMS, PROGRAMS / "nats-server") == text
        elsewhere = rendered(text, PurePosixPath("/srv/x/bin"), PurePosixPath("/usr/bin/nats-server"))
        changed = [line for line, was in zip(elsewhere.splitlines(), text.splitlines(), strict=True) if line != was]
        assert (
            all(re.match(r"Exec\w+=(/srv/x/bin/resplit|/usr/bin/nats-server) ", line) for line in changed) and changed
        )
        assert str(PROGRAMS) not in elsewhere


@pytest.mark.parametrize(
    "path", ["/home/anna/venv/bin", "/tmp/venv/bin", "relative/bin", "/opt/my resplit/bin", "/a%b"]
)
def test_a_program_that_the_unit_could_not_start_is_refused(path: str) -> None:
    with pytest.raises(ResplitError) as refused:
        rendered(shipped(TEMPLATES["agent"]), PurePosixPath(path), PROGRAMS / "nats-server")
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "prefix")


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("agent", None),
        ("agent", "N1"),
        ("agent", "models"),
        ("agent", "keys-n1"),
        ("orchestrator", "n1"),
        ("nats", "a"),
    ],
)
def test_a_name_that_does_not_go_with_the_role_is_refused(role: Any, name: str | None) -> None:
    with pytest.raises(ResplitError) as refused:
        service(role, name)
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "name")


def test_on_the_machine_that_runs_users_come_first_and_systemd_is_told_last() -> None:
    given = Given(
        template=shipped(TEMPLATES["agent"]),
        users=shipped("resplit.sysusers"),
        socket=shipped(SOCKET),
        programs=PROGRAMS,
        nats_server=PROGRAMS / "nats-server",
        url="nats://10.0.0.2:4222",
    )
    found = steps(service("agent", "n1"), given, live=True, start=True)
    done = [
        step.command[:2] if isinstance(step, Run) else step.path.name for step in found if not isinstance(step, Join)
    ]
    assert done == [
        "resplit.conf",
        ("systemd-sysusers", "/etc/sysusers.d/resplit.conf"),
        "resplit-agent@.service",
        "agent-n1.env",
        ("systemctl", "daemon-reload"),
        ("systemctl", "enable"),
    ]  # fmt: skip
    assert found[-1] == Run(("systemctl", "enable", "--now", "--no-block", "resplit-agent@n1.service"))
    image = steps(service("agent", "n1"), given, live=False, start=False)
    assert image == tuple(step for step in found if isinstance(step, Write))


def run(*arguments: object) -> Result:
    """Run one command; in a thread, because commands have loops of their own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(CliRunner().invoke, app, ["install-service", *map(str, arguments)]).result()


def installed(root: Path, *arguments: object) -> str:
    ended = run(*arguments, "--root", root, *PREFIX)
    assert ended.exit_code == Exit.OK, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster, and one bundle for each role that a service has."""
    folder, now = tmp_path_factory.mktemp("bundles"), datetime.now(UTC)
    found_cluster(folder / "cluster", now=now, hosts=["10.0.0.2"])
    members: list[tuple[str, Role, TrustTier | None]] = [
        ("n1", "agent", "edge"), ("orchestrator", "orchestrator", None), ("app", "client", None),
        ("eye", "observer", None),
    ]  # fmt: skip
    for name, role, tier in members:
        roots = [load_holder(folder / "cluster" / "root-0.key")]
        bundle = enrol(folder / "cluster", NodeId(name), role, tier, timedelta(days=9), roots, now=now)
        (folder / f"{name}.bundle").write_bytes(bundle)
    return folder


def test_an_agent_is_put_in_place_and_again_nothing_changes(tmp_path: Path, bundles: Path) -> None:
    asked = ("agent", "n1", "--bundle", bundles / "n1.bundle", "--url", "nats://10.0.0.2:4222")
    options = ("--options", "--listen 10.0.0.11:7410 --memory 6GiB")
    said = installed(tmp_path, *asked, *options)
    assert "agent n1, until" in said and said.endswith("next: systemctl enable --now resplit-agent@n1.service\n")
    assert (tmp_path / "etc/systemd/system/resplit-agent@.service").read_text() == shipped("resplit-agent@.service")
    assert (tmp_path / "etc/sysusers.d/resplit.conf").read_text() == shipped("resplit.sysusers")
    lines = (tmp_path / "etc/resplit/agent-n1.env").read_text().splitlines()
    assert lines[1:] == ["RESPLIT_URL=nats://10.0.0.2:4222", f"RESPLIT_AGENT_OPTIONS={options[1]}"]
    keys = tmp_path / "var/lib/resplit/keys-n1"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700 and load_identity(keys, NodeId("n1")).name == "n1"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "etc").rglob("*") if path.is_file()}
    again = installed(tmp_path, *asked, *options)
    assert again.count("as it was") == 3 and "written" not in again
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "etc").rglob("*") if path.is_file()}


def test_settings_that_somebody_changed_are_kept_and_that_is_said(tmp_path: Path) -> None:
    installed(tmp_path, "orchestrator", "--url", "nats://10.0.0.2:4222")
    path = tmp_path / "etc/resplit/orchestrator.env"
    own = path.read_text().replace("OPTIONS=", "OPTIONS=--keep recent")
    path.write_text(own)
    said = installed(tmp_path, "orchestrator", "--url", "nats://10.0.0.9:4222")
    assert "KEPT" in said and "- RESPLIT_ORCHESTRATOR_OPTIONS=--keep recent" in said
    assert "+ RESPLIT_URL=nats://10.0.0.9:4222" in said and path.read_text() == own
    assert "orchestrator.env.old" in installed(tmp_path, "orchestrator", "--url", "nats://10.0.0.9:4222", "--replace")
    assert "10.0.0.9" in path.read_text() and path.with_name("orchestrator.env.old").read_text() == own


def test_a_gateway_asks_as_a_client_and_looks_as_an_observer(tmp_path: Path, bundles: Path) -> None:
    installed(tmp_path, "gateway", "--bundle", bundles / "app.bundle", "--watch", bundles / "eye.bundle")
    told = (tmp_path / "etc/resplit/gateway.env").read_text()
    assert "RESPLIT_GATEWAY_OPTIONS=--listen 127.0.0.1:8000\nRESPLIT_WATCH_KEYS=/var/lib/resplit/watch\n" in told
    assert "ListenStream=127.0.0.1:8000\n" in (tmp_path / "etc/systemd/system" / SOCKET).read_text()
    state = tmp_path / "var/lib/resplit"
    assert (state / "gateway/app.nk").exists() and (state / "watch/eye.nk").exists()
    refused = run("gateway", "--bundle", bundles / "eye.bundle", "--root", tmp_path, *PREFIX)
    assert refused.exit_code == Exit.USAGE and "the bundle is of the observer 'eye'" in refused.stderr


@pytest.mark.parametrize("options", ["--listen 10.0.0.2:443 --open", "--open --listen=10.0.0.2:443"])
def test_a_gateway_is_reached_where_its_options_say(tmp_path: Path, options: str) -> None:
    installed(tmp_path, "gateway", "--options", options)
    path = tmp_path / "etc/systemd/system" / SOCKET
    assert "ListenStream=10.0.0.2:443\n" in path.read_text()


def test_anothers_bundle_is_refused_before_anything_of_it_is_written(tmp_path: Path, bundles: Path) -> None:
    refused = run("agent", "n2", "--bundle", bundles / "n1.bundle", "--root", tmp_path, *PREFIX)
    assert refused.exit_code == Exit.USAGE and "the bundle is of the agent 'n1'" in refused.stderr
    assert not (tmp_path / "var/lib/resplit/keys-n2").exists()


def test_a_nats_server_gets_the_files_of_its_folder_and_its_key_is_secret(tmp_path: Path, bundles: Path) -> None:
    said = installed(tmp_path, "nats", "--server", bundles / "cluster")
    there = tmp_path / "etc/resplit/nats"
    names = {"nats-server.conf", "logins.conf", "ca.pem", "nats-server.pem", "nats-server.key"}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        name: (bundles / "cluster" / name).read_bytes() for name in names
    }
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in there.iterdir()}
    assert modes == {name: 0o640 if name.endswith(".key") else 0o644 for name in names}
    assert "chown root:nats" in said
    (there / "nats-server.conf").write_text("mine")
    assert "KEPT" in installed(tmp_path, "nats", "--server", bundles / "cluster")
    assert (there / "nats-server.conf").read_text() == "mine"


def test_a_dry_run_shows_all_but_keys_and_writes_nothing(tmp_path: Path, bundles: Path) -> None:
    ended = run("nats", "--server", bundles / "cluster", "--now", "--dry-run", *PREFIX)
    assert ended.exit_code == Exit.OK
    assert "# write /etc/resplit/nats/nats-server.key (0640 root:nats)\n\n" in ended.stdout
    assert "PRIVATE KEY" not in ended.stdout and "systemctl enable --now --no-block nats-server.service" in ended.stdout
    assert shipped("nats-server.service") in ended.stdout
    assert installed(tmp_path, "agent", "n1", "--dry-run") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("agent", "n1", "--options", "--lisen x"), "No such option: --lisen"),
        (("agent", "n1", "--options", "--listen '1.2.3.4:5'"), "systemd reads otherwise"),
        (("agent", "n1", "--watch", "x"), "only a gateway"),
        (("nats", "--bundle", "x"), "--server"),
        (("agent", "n1", "--now"), "--now is for the machine that runs"),
        (("driver",), "driver"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    ended = run(*arguments, "--root", tmp_path, *PREFIX)
    assert ended.exit_code == Exit.USAGE and list(tmp_path.iterdir()) == []
    assert why in re.sub(r"\s+", " ", ended.stderr)


def test_who_is_not_root_and_what_systemd_did_not_start_are_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    ended = run("agent", "n1", *PREFIX)
    assert ended.exit_code == Exit.REFUSED and "run it as root" in ended.stderr
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(services, "BOOTED", tmp_path / "none")
    ended = run("agent", "n1", *PREFIX)
    assert ended.exit_code == Exit.FAILED and "--root DIR" in ended.stderr
