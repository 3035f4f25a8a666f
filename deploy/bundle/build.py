"""The archive that installs Resplit where there is no network: `make bundle`. For the machine's own architecture and
version of Python, since that is whose wheels pip fetches.

It holds wheels (Resplit's own and all that it needs, each in the version that constraints.txt says), the units, the
configurations of NATS servers, the manifests for Kubernetes, the documents, `install.sh`, and every file's SHA-256.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("deploy/systemd", "deploy/nats", "deploy/kubernetes", "docs")
FILES = ("README.md", "CHANGELOG.md", "LICENSE", "constraints.txt")
SUMS = "SHA256SUMS"


def bundle(out: Path, extras: str = "") -> Path:
    """Write the archive into the folder `out`; `extras` of Resplit as pip takes them, with commas between. Needs what
    pip needs to fetch wheels that it has not in its cache. Raises `subprocess.CalledProcessError` where that fails."""
    name = bundle_name(extras)
    with tempfile.TemporaryDirectory() as folder:
        source, there = Path(folder) / "source", Path(folder) / name
        copy_tracked(source)
        fetch_wheels(source, there / "wheels", extras)
        for kept in FOLDERS:
            shutil.copytree(source / kept, there / kept)
        for kept in FILES:
            shutil.copy(source / kept, there / kept)
        shutil.copy(source / "deploy/bundle/install.sh", there / "install.sh")
        (there / "BUNDLE").write_text(
            f"version={version()}\nmachine={platform.machine()}\npython={python()}\nextras={extras}\n"
        )
        (there / SUMS).write_text("".join(sums(there)))
        out.mkdir(parents=True, exist_ok=True)
        archive = out / f"{name}.tar"  # wheels are packed already
        with tarfile.open(archive, "w") as tar:
            tar.add(there, name, filter=_plain)
    return archive


def bundle_name(extras: str = "") -> str:
    """What the archive and the folder in it are called."""
    more = f"-{extras.replace(',', '-')}" if extras else ""
    return f"resplit-{version()}{more}-linux-{platform.machine()}-py{python()}"


def copy_tracked(target: Path) -> None:
    """The files of this checkout that are under version control, as they are now: what an earlier build left behind
    would end in the wheel."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def fetch_wheels(source: Path, target: Path, extras: str) -> None:
    """Resplit's wheel and those of all that it needs; what has none is built here."""
    wanted = f"{source}[{extras}]" if extras else str(source)
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--progress-bar", "off"]
    subprocess.run([*command, "--constraint", source / "constraints.txt", "--wheel-dir", target, wanted], check=True)


def sums(folder: Path) -> Iterator[str]:
    """A line for each file, as `sha256sum -c` reads them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS:
            with path.open("rb") as file:
                yield f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n"


def version() -> str:
    """Resplit's."""
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return found


def python() -> str:
    """The version of Python whose wheels these are, as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mode = 0o755 if entry.isdir() or entry.name.endswith(".sh") else 0o644
    return entry


def main() -> None:
    """Build it, and say where it is and how large."""
    asked = argparse.ArgumentParser(description="Build the archive that installs Resplit without a network.")
    asked.add_argument("--out", type=Path, default=ROOT / "build", help="the folder to write it into")
    asked.add_argument("--extras", default="", help="of Resplit, as `models` or `cuda,models`")
    options = asked.parse_args()
    archive = bundle(options.out, options.extras)
    print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
