"""One process alone runs as a member; real processes, of which one is killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from bus.sole import sole
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

N1, N2 = NodeId("n1"), NodeId("n2")
HOLDS = """
import sys, time
from pathlib import Path
from bus.sole import sole
with sole(Path(sys.argv[1]), "n1"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_which_one_runs_and_may_when_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            with pytest.raises(ResplitError) as refused, sole(tmp_path, N1):
                pytest.fail("two processes run as one member")
            assert refused.value.code is ErrorCode.FORBIDDEN
            assert f"as process {first.pid};" in refused.value.message
            with sole(tmp_path, N2):
                pass  # another member is no second one
        finally:
            first.kill()
    with sole(tmp_path, N1):
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResplitError) as refused, sole(tmp_path / "nowhere", N1):
        pytest.fail("there is no such folder")
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert str(tmp_path / "nowhere" / "n1.lock") in refused.value.message
