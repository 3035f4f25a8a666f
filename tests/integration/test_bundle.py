"""The archive for machines without a network: built, installed in a namespace that has none, and run from there."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from deploy.bundle.build import SUMS, bundle, bundle_name, python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed"),
]
OFFLINE = """
import fcntl, os, socket, struct, sys
with socket.socket() as one:  # loopback up (SIOCSIFFLAGS, IFF_UP)
    fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 1))
    try:
        one.connect(("192.0.2.1", 9))
        sys.exit("there is a network")
    except OSError:
        pass
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, unpacked as whoever carried it somewhere would."""
    folder = tmp_path_factory.mktemp("bundle")
    archive = bundle(folder / "out")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return folder / bundle_name()


def offline(*command: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command where there is no network but loopback, and nothing of this environment."""
    base = Path(sys.base_prefix, "bin")
    environ = {"HOME": str(home), "TMPDIR": str(home), "PATH": f"{base}:/usr/sbin:/usr/bin:/sbin:/bin"}
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    alone = ["unshare", *user, "--net", str(base / f"python{python()}"), "-c", OFFLINE]
    return subprocess.run([*alone, *command], env=environ, cwd=home, capture_output=True, text=True, check=False)


def test_it_installs_without_a_network_and_runs_the_demonstration(unpacked: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    for _ in range(2):  # again: an upgrade
        done = offline("sh", str(unpacked / "install.sh"), str(prefix), home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"is in {prefix}" in done.stdout
    dry = ("install-service", "orchestrator", "--dry-run", "--prefix", "/opt/resplit")
    shown = offline(str(prefix / "bin" / "resplit"), *dry, home=tmp_path)
    assert (unpacked / "deploy/systemd/resplit-orchestrator.service").read_text() in shown.stdout
    ran = offline(str(prefix / "bin" / "resplit"), "demo", home=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Every answer is the uncut model's." in ran.stdout


def test_a_file_that_was_changed_added_or_lost_is_found_before_anything_is_installed(
    unpacked: Path, tmp_path: Path
) -> None:
    script, prefix = str(unpacked / "install.sh"), tmp_path / "opt"
    readme = unpacked / "README.md"
    whole = readme.read_bytes()
    readme.write_bytes(whole.replace(b"e", b"a", 1))
    refused = offline("sh", script, str(prefix), home=tmp_path)
    assert refused.returncode == 1 and "README.md: FAILED" in refused.stdout + refused.stderr
    readme.unlink()
    assert offline("sh", script, str(prefix), home=tmp_path).returncode == 1
    readme.write_bytes(whole)
    strange = unpacked / "wheels" / "strange-1-py3-none-any.whl"
    strange.touch()
    refused = offline("sh", script, str(prefix), home=tmp_path)
    assert refused.returncode == 1 and "were packed" in refused.stderr
    strange.unlink()
    assert not prefix.exists()
    assert len((unpacked / SUMS).read_text().splitlines()) > 50


def test_another_machine_or_python_is_told_so(unpacked: Path, tmp_path: Path) -> None:
    said = unpacked / "BUNDLE"
    whole = said.read_text()
    for was, other, why in (
        (f"python={python()}", "python=2.7", "there is no python2.7"),
        ("machine=", "machine=pdp11", "for Linux on pdp11"),
    ):
        said.write_text(whole.replace(was, other))
        refused = offline("sh", str(unpacked / "install.sh"), str(tmp_path / "opt"), home=tmp_path)
        said.write_text(whole)
        assert refused.returncode == 1 and why in refused.stderr and not (tmp_path / "opt").exists()
