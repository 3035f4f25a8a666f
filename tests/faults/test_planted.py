"""The fault matrix is no comfort unless it turns red: without each of these safeguards its row does."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "agent",
    "benchmarks",
    "bus",
    "deploy",
    "models",
    "natstls",
    "orchestrator",
    "profiler",
    "resplit",
    "schemas",
)
LIMIT_S = 600


@dataclass(frozen=True)
class Without:
    """A part of a file, and what stands there when it is taken out."""

    file: str
    safeguard: str
    instead: str


@dataclass(frozen=True)
class Planted:
    """A row of the matrix, and the safeguards without which it is to turn red; where two hold, both are taken out."""

    row: str
    runs: int
    without: tuple[Without, ...]
    says: str
    """Part of what is found."""


PLANTED = (
    Planted(
        "file-rotten",
        1,  # at least one of each kind of rot
        (Without("agent/fetching.py", "(verify_again if again else verify_once)(self._store, ref)", "pass"),),
        "nobody noticed",
    ),
    Planted(
        "words-forged",
        1,
        (Without("schemas/envelope.py", "key.verify(signature, pae(payload_type, payload))", "pass"),),
        "lost",
    ),
    Planted(
        "ingress-killed",
        1,
        (Without("agent/heirs.py", "for served in self._ingress.served:", "for served in ():"),),
        "after",
    ),
    Planted(
        "agent-hung",
        1,
        (
            Without(
                "orchestrator/fold.py",
                "LOST_IN_PLAN = timedelta(seconds=LOST_AFTER_S)",
                "LOST_IN_PLAN = timedelta(seconds=15)",
            ),
            Without(
                "orchestrator/fold.py", "LOST_STALLED = timedelta(seconds=2.5)", "LOST_STALLED = timedelta(seconds=15)"
            ),
        ),
        "late by",
    ),
    Planted(
        "leader-hung",
        6,
        (
            Without(
                "orchestrator/log.py", "            await self._may_act()\n            headers", "            headers"
            ),
            Without("orchestrator/log.py", "Header.EXPECTED_LAST_SEQUENCE.value: str(self._last),", ""),
        ),
        "behind one of term",
    ),
    Planted(
        "bus-cut",
        3,
        (
            Without("natstls/client.py", "USER_TIMEOUT_MS = 5000", "USER_TIMEOUT_MS = 60_000"),
            Without("natstls/client.py", "PING_S, PINGS_MAX = 2, 2", "PING_S, PINGS_MAX = 60, 2"),
            Without("natstls/patience.py", "SILENT_S = 5.0", "SILENT_S = 60.0"),
        ),
        "late by",
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.row)
def test_a_row_turns_red_without_its_safeguard(planted: Planted, tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "results")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for without in planted.without:
        file = tmp_path / without.file
        text = file.read_text()
        assert text.count(without.safeguard) == 1, f"{without.file} is not as it was: plant this anew"
        file.write_text(text.replace(without.safeguard, without.instead))
    asked = ["--forget", "--runs", str(planted.runs), "--only", planted.row]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    verdict = ran.stdout.partition(f"\n{planted.row}: ")[2].rpartition("\n")[0] or ran.stdout
    if f"{planted.row}: skipped" in ran.stdout:
        pytest.skip(verdict)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert f"{planted.row}: missed" in ran.stdout and planted.says in ran.stdout, ran.stdout + ran.stderr
