"""Several hold the root, sign one after another, and are replaced: nobody but enough of them changes who belongs."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from bus.cluster_folder import PENDING, open_cluster
from bus.enrolment import enrol, renew, rotate
from bus.folders import FIRST_ROOT, ROSTER
from bus.founding import Holder, found_cluster, load_holder
from bus.holders import adopt, countersign_pending, replace_holders, review
from bus.identity import load_identity
from bus.joining import join, with_roster
from bus.membership import Membership
from bus.remembered import write_durably
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import ROSTER_TYPE, Roster, present
from schemas.signed import KeyId, key_id, sign
from tests.kept_folders import content, refused

# Certificates are checked by the clock of the machine where a link is made, so this clock is it.
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
N0, N1, LEADER = NodeId("n0"), NodeId("n1"), NodeId("leader")


def holders(folder: Path, *numbers: int) -> list[Holder]:
    return [load_holder(folder / f"root-{number}.key") for number in numbers]


def ids(found: list[Holder]) -> list[KeyId]:
    return [key_id(holder.signing.public_key()) for holder in found]


def newest(folder: Path) -> Roster:
    return open_cluster(folder).roster


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    found_cluster(folder, now=NOW, holders=3, threshold=2)
    return folder


def test_two_of_three_holders_enrol_at_once_or_one_after_another(shared: Path, tmp_path: Path) -> None:
    at_once = enrol(shared, LEADER, "orchestrator", None, 30 * DAY, holders(shared, 0, 2), now=NOW)
    assert join(at_once, tmp_path / "leader", NOW).member.role == "orchestrator"

    before = newest(shared)
    bundle = enrol(shared, N0, "agent", "trusted", 30 * DAY, holders(shared, 1), now=NOW)
    pending = (shared / PENDING).read_bytes()
    assert newest(shared) == before
    refused(
        ErrorCode.BAD_SIGNATURE,
        "1 valid signatures of the 2",
        tmp_path / "n0",
        lambda: join(bundle, tmp_path / "n0", NOW),
    )
    refused(ErrorCode.BAD_SIGNATURE, "1 valid signatures of the 2", shared, lambda: adopt(shared, pending))

    (elsewhere := tmp_path / "elsewhere").mkdir()  # the other holder's machine has this, beside its own key
    (elsewhere / FIRST_ROOT).write_bytes((shared / FIRST_ROOT).read_bytes())
    draft = review(pending, elsewhere)
    assert draft.root == draft.before
    assert [member.name for member in draft.roster.members] == ["leader", "n0"]
    complete = countersign_pending(pending, elsewhere, holders(shared, 2))
    assert adopt(shared, complete) == newest(shared)
    assert not (shared / PENDING).exists()
    assert join(with_roster(bundle, complete), tmp_path / "n0", NOW).member.tier == "trusted"
    assert adopt(shared, complete) == newest(shared)


def test_a_change_that_is_pending_is_not_overtaken(shared: Path) -> None:
    one, both = holders(shared, 0), holders(shared, 0, 1)
    enrol(shared, N0, "agent", "edge", DAY, one, now=NOW)
    for roots in (one, both):
        refused(
            ErrorCode.INVALID_REQUEST,
            "a change is pending",
            shared,
            partial(enrol, shared, N1, "agent", "edge", DAY, roots, now=NOW),
        )


def test_a_holder_countersigns_nothing_that_no_other_holder_signed(shared: Path, tmp_path: Path) -> None:
    found_cluster(tmp_path / "other", now=NOW)
    foreign = (tmp_path / "other" / ROSTER).read_bytes()
    with pytest.raises(ResplitError, match="0 valid signatures") as caught:
        countersign_pending(foreign, shared, holders(shared, 0))
    assert caught.value.code is ErrorCode.BAD_SIGNATURE


def test_a_change_stays_pending_until_it_is_the_one_adopted(shared: Path) -> None:
    enrol(shared, N0, "agent", "edge", DAY, holders(shared, 0), now=NOW)
    before = content(shared)
    adopt(shared, (shared / ROSTER).read_bytes())
    assert content(shared) == before
    complete = countersign_pending((shared / PENDING).read_bytes(), shared, holders(shared, 1))
    write_durably(shared / ROSTER, complete, 0o644)  # a crash came here, the last time
    adopt(shared, complete)
    assert not (shared / PENDING).exists()


def test_an_old_roster_is_not_adopted(shared: Path) -> None:
    old = (shared / ROSTER).read_bytes()
    enrol(shared, N0, "agent", "edge", DAY, holders(shared, 0, 1), now=NOW)
    refused(ErrorCode.ROLLED_BACK, "the roster is version 1", shared, lambda: adopt(shared, old))


# Others hold the root


def replaced(folder: Path, signing: list[Holder], staying: list[Holder], added: int = 1, threshold: int = 2) -> Path:
    """The file of the last of the new holders."""
    _, files = replace_holders(folder, signing, staying=ids(staying), added=added, threshold=threshold, now=NOW)
    return files[-1]


def test_who_lost_a_key_is_replaced_and_can_sign_nothing_any_more(shared: Path, tmp_path: Path) -> None:
    bundle = enrol(shared, N0, "agent", "edge", 30 * DAY, holders(shared, 0, 1), now=NOW)
    n0 = join(bundle, tmp_path / "n0", NOW)
    old = open_cluster(shared)
    new = load_holder(replaced(shared, holders(shared, 0, 1), holders(shared, 0, 1)))
    cluster = open_cluster(shared)
    assert (cluster.root.version, cluster.root.threshold) == (2, 2)
    assert set(cluster.root.keys) == {*ids(holders(shared, 0, 1)), *ids([new])}
    assert (cluster.roster.members, cluster.roster.version) == (old.roster.members, old.roster.version + 1)

    # The lost one signs with another who left with it, or with one who stayed: for the root before and for this one.
    for signers in (holders(shared, 2), holders(shared, 0, 2)):
        refused(
            ErrorCode.INVALID_REQUEST, "is not a holder of the root", shared, partial(renew, shared, signers, now=NOW)
        )
    keys = {key_id(holder.signing.public_key()): holder.signing for holder in holders(shared, 0, 2)}
    forged = old.roster.model_copy(update={"version": 9})
    for roster in (forged, forged.model_copy(update={"root_version": 2})):
        data = present(cluster.roots, sign(roster, ROSTER_TYPE, keys))
        refused(ErrorCode.BAD_SIGNATURE, "1 valid signatures", shared, partial(adopt, shared, data))

    renewed = renew(shared, [new, *holders(shared, 0)], now=NOW)
    assert newest(shared) == renewed
    assert join(with_roster(bundle, (shared / ROSTER).read_bytes()), tmp_path / "n0", NOW).known.root == cluster.root
    assert n0.known.root == old.root


async def test_members_follow_from_whichever_root_they_know(shared: Path, tmp_path: Path) -> None:
    both = holders(shared, 0, 1)
    for name in (N0, N1):
        join(enrol(shared, name, "agent", "trusted", 30 * DAY, both, now=NOW), tmp_path / name, NOW)
    follows, was_away = load_identity(tmp_path / N0, N0), load_identity(tmp_path / N1, N1)
    for _ in range(2):
        replaced(shared, both, both)
        assert await follows.take_roster((shared / ROSTER).read_bytes())
    last = (shared / ROSTER).read_bytes()
    assert await was_away.take_roster(last)
    assert not await was_away.take_roster(last)
    assert follows.root == was_away.root == open_cluster(shared).root
    assert (tmp_path / N0 / ROSTER).read_bytes() == (tmp_path / N1 / ROSTER).read_bytes() == last

    renew(shared, both, now=NOW)
    first, *roots = open_cluster(shared).roots
    assert first and roots
    honest = (shared / ROSTER).read_bytes()
    with pytest.raises(ResplitError, match="is not a signed document"):
        await follows.take_roster(b"\xc0" + honest[len(first) :])
    assert await follows.take_roster(honest)


def test_a_roster_and_its_root_are_found_where_power_failed_before_they_were_remembered(
    shared: Path, tmp_path: Path
) -> None:
    both = holders(shared, 0, 1)
    join(enrol(shared, N0, "agent", "trusted", 30 * DAY, both, now=NOW), tmp_path / N0, NOW)
    replaced(shared, both, both)
    write_durably(tmp_path / N0 / ROSTER, (shared / ROSTER).read_bytes(), 0o644)
    assert load_identity(tmp_path / N0, N0).root == open_cluster(shared).root
    assert Membership(tmp_path / N0).roster == newest(shared)


def test_an_older_bundle_is_a_rollback_under_a_newer_root(shared: Path, tmp_path: Path) -> None:
    both = holders(shared, 0, 1)
    bundle = enrol(shared, N0, "agent", "edge", 30 * DAY, both, now=NOW)
    replaced(shared, both, both)
    join(rotate(shared, N0, both, now=NOW), tmp_path / N0, NOW)
    refused(ErrorCode.ROLLED_BACK, "the root's version is 1", tmp_path / N0, lambda: join(bundle, tmp_path / N0, NOW))


def test_a_new_root_waits_for_a_threshold_of_the_old_and_one_of_the_new_holders(shared: Path, tmp_path: Path) -> None:
    """The holder of key 2 is out, a new one comes; key 0 is here and the holder of key 1 far away."""
    here, away = holders(shared, 0), holders(shared, 1)
    before = open_cluster(shared)
    new = load_holder(replaced(shared, here, here + away, threshold=3))
    assert open_cluster(shared) == before
    pending = (shared / PENDING).read_bytes()
    refused(ErrorCode.BAD_SIGNATURE, "1 valid signatures of the 2", shared, partial(adopt, shared, pending))
    draft = review(pending, shared)
    assert (draft.before, set(draft.root.keys)) == (before.root, {*ids(here), *ids(away), *ids([new])})
    refused(
        ErrorCode.INVALID_REQUEST,
        "is not a holder of the root",
        shared,
        partial(countersign_pending, pending, shared, holders_of_another(tmp_path)),
    )
    complete = countersign_pending(pending, shared, away)
    assert adopt(shared, complete) == draft.roster
    assert (open_cluster(shared).root, (shared / PENDING).exists()) == (draft.root, False)
    refused(
        ErrorCode.INVALID_REQUEST,
        "is not a holder",
        shared,
        partial(renew, shared, [*here, *away, *holders(shared, 2)], now=NOW),
    )


def holders_of_another(folder: Path) -> list[Holder]:
    found_cluster(folder / "another", now=NOW)
    return holders(folder / "another", 0)


def test_a_key_in_wrong_hands_signs_its_own_end(tmp_path: Path) -> None:
    found_cluster(tmp_path / "cluster", now=NOW)
    cluster, [leaked] = tmp_path / "cluster", holders(tmp_path / "cluster", 0)
    new = load_holder(replaced(cluster, [leaked], [], threshold=1))
    assert set(open_cluster(cluster).root.keys) == set(ids([new]))
    refused(ErrorCode.INVALID_REQUEST, "is not a holder", cluster, partial(renew, cluster, [leaked], now=NOW))
    assert renew(cluster, [new], now=NOW).root_version == 2


@pytest.mark.parametrize(
    ("staying", "added", "threshold", "why"),
    [
        ((0, 1), 0, 3, "3 signatures cannot come from 2 keys"),
        ((), 0, 1, "too_short|at least 1"),
        ((1,), 0, 1, "nobody signs who will be a holder"),
    ],
)
def test_a_root_that_nobody_could_use_is_not_made(
    shared: Path, staying: tuple[int, ...], added: int, threshold: int, why: str
) -> None:
    stay = holders(shared, *staying)
    refused(
        ErrorCode.INVALID_REQUEST, why, shared, lambda: replaced(shared, holders(shared, 0), stay, added, threshold)
    )


def test_only_holders_stay(shared: Path, tmp_path: Path) -> None:
    stranger = holders_of_another(tmp_path)
    refused(
        ErrorCode.INVALID_REQUEST,
        "holds no key of the root",
        shared,
        lambda: replaced(shared, holders(shared, 0, 1), stranger),
    )
