"""Two minutes of what `make soak` does for an hour."""

import shutil
from pathlib import Path

import pytest

from benchmarks.soak.report import rows
from benchmarks.soak.soak import soak
from models.store import Store
from resplit.demo import shipped_store

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow, pytest.mark.timeout(600)]


async def test_nothing_is_lost_left_or_unaccounted_for_under_faults_that_follow_one_another(tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(shipped_store(), tmp_path / "store")))
    told = await soak(tmp_path, store, 120.0, seed=1)
    assert told.faults and told.accepted and told.events
    missed = [row for row in rows(told) if row["verdict"].startswith("missed")]
    assert not missed
