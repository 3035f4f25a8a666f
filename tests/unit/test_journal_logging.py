"""Under systemd, logs go to the journal as entries with fields."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, os, sys
import logging_journald
logging_journald.JournaldLogHandler.SOCKET_PATH = sys.argv[1]
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = sys.argv[2] or f"{found.st_dev}:{found.st_ino}"
from resplit.running import log_to_stderr
log_to_stderr(logging.INFO)
logging.getLogger("resplit.test").warning("a plan was %s", "refused", extra={"kind": "plan_refused", "epoch": 3})
"""


def logged(path: Path, stream: str) -> tuple[dict[str, str], str]:
    """The fields of the entry that came, if any did, and what stood on stderr."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        journal.settimeout(0.5)
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), stream], capture_output=True, check=True, env=os.environ
        )
        try:
            data = journal.recv(1 << 16)
        except TimeoutError:
            return {}, run.stderr.decode()
    return dict(line.split("=", 1) for line in data.decode().splitlines() if "=" in line), run.stderr.decode()


def test_entries_have_fields_where_stderr_is_the_journal(tmp_path: Path) -> None:
    entry, stderr = logged(tmp_path / "socket", "")
    assert entry["MESSAGE"] == "resplit.test: a plan was refused"
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "resplit"
    assert (entry["EXTRA_KIND"], entry["EXTRA_EPOCH"]) == ("plan_refused", "3")
    assert stderr == ""


def test_elsewhere_they_are_lines(tmp_path: Path) -> None:
    entry, stderr = logged(tmp_path / "socket", "1:1")
    assert entry == {}
    assert "WARNING resplit.test: a plan was refused" in stderr
