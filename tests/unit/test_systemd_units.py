"""The units that are shipped: systemd reads them without a word, and they give away little."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy"
INSTALLED = "/opt/resplit/bin/resplit"
EXPOSURE = 2.5
"""The most that `systemd-analyze security` may say, of 10."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture(params=["resplit-agent@.service", "resplit-orchestrator.service"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One of them, of an agent the instance n0, with a program that this machine has."""
    name = str(request.param)
    text = (UNITS / name).read_text()
    assert INSTALLED in text
    path = tmp_path / name.replace("@.", "@n0.")
    path.write_text(text.replace(INSTALLED, "/bin/true"))
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
def test_a_unit_may_do_little(unit: Path) -> None:
    said = analyze("security", "--offline=true", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for .*: ([\d.]+)", said)
    assert exposure is not None, said
    assert float(exposure[1]) <= EXPOSURE
