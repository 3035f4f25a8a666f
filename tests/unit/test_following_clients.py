"""Who belongs, as a client keeps up with it: only forward, remembered where that is possible, and always whole."""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bus.folders import ROSTER
from bus.identity import load_identity, read_roster
from bus.membership import Membership
from bus.together import CLIENT, CLUSTER, add_member, make_members
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

A = NodeId("a")


def rosters(tmp_path: Path, count: int) -> list[bytes]:
    """A cluster's rosters, the oldest first, of which a client's folder `own` has the first."""
    keys = tmp_path / "keys"
    make_members(keys, [A])
    shutil.copytree(keys / CLIENT, tmp_path / "own")
    newer = [add_member(keys, NodeId(f"m{i}"), "agent", "trusted") for i in range(count - 1)]
    return [(tmp_path / "own" / ROSTER).read_bytes(), *newer]


def test_a_roster_from_the_bus_counts_is_remembered_and_nothing_goes_back(tmp_path: Path) -> None:
    first, second, third = rosters(tmp_path, 3)
    here = Membership(tmp_path / "own")
    assert [here.take(third), here.take(third)] == [True, False]
    for old in (first, second):
        with pytest.raises(ResplitError) as refused:
            here.take(old)
        assert refused.value.code is ErrorCode.ROLLED_BACK
    again = Membership(tmp_path / "own")
    assert again.roster == here.roster and again.roster.member(NodeId("m1")) is not None
    with pytest.raises(ResplitError):
        again.take(second)
    assert load_identity(tmp_path / "own", CLIENT).roster == again.roster, "and its folder is whole"
    make_members(tmp_path / "other", [A])
    with pytest.raises(ResplitError) as refused:
        again.take((tmp_path / "other" / CLUSTER / ROSTER).read_bytes())
    assert refused.value.code is ErrorCode.BAD_SIGNATURE


def test_where_nothing_can_be_written_the_newest_roster_counts_for_this_process(tmp_path: Path) -> None:
    _, second = rosters(tmp_path, 2)
    own = tmp_path / "own"
    (own / f".{ROSTER}.{os.getpid()}.new").mkdir()  # where it would be written first; to root no folder is closed
    before = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    here = Membership(own)
    assert here.take(second)
    here.look()
    assert here.roster.member(NodeId("m0")) is not None
    assert {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()} == before


def test_a_newer_file_counts_and_an_older_one_is_an_error(tmp_path: Path) -> None:
    first, second = rosters(tmp_path, 2)
    own = tmp_path / "own"
    here = Membership(own)
    (own / ROSTER).write_bytes(second)
    here.look()
    assert here.roster.member(NodeId("m0")) is not None
    assert here.take(second) is False
    add_member(tmp_path / "keys", NodeId("m9"), "agent", "trusted")
    assert here.take((tmp_path / "keys" / CLUSTER / ROSTER).read_bytes())
    (own / ROSTER).write_bytes(first)
    with pytest.raises(ResplitError) as refused:
        here.look()
    assert refused.value.code is ErrorCode.ROLLED_BACK, "somebody puts back what was replaced"
    assert here.roster.member(NodeId("m9")) is not None


def test_the_cluster_s_own_folder_is_left_to_its_holders(tmp_path: Path) -> None:
    first, second = rosters(tmp_path, 2)
    root = tmp_path / "keys" / CLUSTER
    (root / ROSTER).write_bytes(first)
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    here = Membership(root)
    assert here.take(second)
    assert here.roster.member(NodeId("m0")) is not None
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == before


def test_the_folder_of_an_agent_is_left_to_the_agent(tmp_path: Path) -> None:
    """It writes there itself whenever it likes, and what it remembers of plans must not be undone."""
    keys = tmp_path / "keys"
    make_members(keys, [A])
    shutil.copytree(keys / A, tmp_path / "agent")
    before = {path.name: path.read_bytes() for path in (tmp_path / "agent").iterdir()}
    here = Membership(tmp_path / "agent")
    assert here.take(add_member(keys, NodeId("m0"), "agent", "trusted"))
    assert here.roster.member(NodeId("m0")) is not None
    assert {path.name: path.read_bytes() for path in (tmp_path / "agent").iterdir()} == before


def test_processes_that_share_a_folder_leave_it_whole(tmp_path: Path) -> None:
    """Several commands at once, each of which hears another roster last."""
    shown = rosters(tmp_path, 6)
    here = [Membership(tmp_path / "own") for _ in shown]

    def hear(number: int) -> None:
        for data in shown[: number + 1]:
            with contextlib.suppress(ResplitError):  # another was quicker
                here[number].take(data)

    with ThreadPoolExecutor(len(here)) as pool:
        list(pool.map(hear, range(len(here))))
    assert read_roster(tmp_path / "own") == read_roster(tmp_path / "keys" / CLUSTER)
    assert load_identity(tmp_path / "own", CLIENT).roster.version == here[-1].roster.version
