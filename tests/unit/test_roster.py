"""Who belongs to a cluster is what a threshold of its root says, and nothing that was taken is taken back."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from bus.credentials import SEED_BYTES, nkey_seed, public_nkey
from schemas.base import DeploymentName, Digest, NodeId
from schemas.codec import decode, encode
from schemas.deployment import Sensitive
from schemas.envelope import pae
from schemas.errors import ErrorCode, ResplitError
from schemas.known import (
    CLOCK_BEHIND_MAX,
    JUMP_MAX,
    Known,
    PlanSeen,
    after_plan,
    after_roster,
    first_known,
)
from schemas.roster import (
    DEPLOYMENTS_MAX,
    FORMER_MAX,
    MEMBERS_MAX,
    ROOT_TYPE,
    ROOTS_MAX,
    ROSTER_TYPE,
    ClusterId,
    Former,
    Member,
    Policy,
    RootKeys,
    Roster,
    forbidden,
    former_after,
    members_at,
    open_roster,
    present,
    spelled,
)
from schemas.signed import MAX_DOCUMENT_BYTES, SIGNATURES_MAX, countersign, key_id, open_signed, sign

Keys = dict[str, Ed25519PrivateKey]

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CLUSTER, OTHER_CLUSTER = ClusterId("a" * 32), ClusterId("b" * 32)
CHAT = DeploymentName("chat")
PLAN, OTHER_PLAN = Digest("1" * 64), Digest("2" * 64)


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def keys(*numbers: int) -> Keys:
    return {key_id(key(number).public_key()): key(number) for number in numbers}


def root(version: int, holders: Keys, threshold: int, **changes: Any) -> RootKeys:
    fields = {
        "cluster": CLUSTER,
        "version": version,
        "previous": None if version < 2 else ROOT.digest if version == 2 else SECOND.digest,
        "keys": {name: spelled(holder.public_key()) for name, holder in holders.items()},
        "threshold": threshold,
        "issued_at": NOW - DAY,
        "expires_at": NOW + 365 * DAY,
    }
    return RootKeys.model_validate(fields | changes)


def member(name: str, number: int, **changes: Any) -> Member:
    fields = {
        "name": name,
        "role": "agent",
        "tier": "edge",
        "signing": spelled(key(number).public_key()),
        "sealing": base64.b64encode(bytes([number]) * 32).decode(),
        "bus": public_nkey(nkey_seed(bytes([number]) * SEED_BYTES)),
        "link": sha256(bytes([number])).hexdigest(),
        "not_before": NOW - DAY,
        "not_after": NOW + DAY,
    }
    return Member.model_validate(fields | changes)


HOLDERS, TWO = keys(1, 2, 3), keys(1, 2)
ROOT = root(1, HOLDERS, 2)
SECOND = root(2, HOLDERS, 2)
LEADER = member("leader", 10, role="orchestrator", tier=None)
EDGE, TRUSTED = member("n0", 11), member("n1", 12, tier="trusted")


def roster(version: int, *members: Member, **changes: Any) -> Roster:
    fields = {
        "cluster": CLUSTER,
        "root_version": 1,
        "version": version,
        "issued_at": NOW,
        "expires_at": NOW + 30 * DAY,
        "authority": "c" * 64,
        "members": members or (LEADER, EDGE, TRUSTED),
    }
    return Roster.model_validate(fields | changes)


signed_roster = partial(sign, payload_type=ROSTER_TYPE, keys=TWO)
START = Known(root=ROOT)
AT_FIVE = after_roster(START, signed_roster(roster(5)), NOW)


def refused(code: ErrorCode, field: str | None, known: Known, step: Callable[[Known], object]) -> None:
    """That `step` is refused, with this code and for this field, and `known` is what it was."""
    before = known.model_copy(deep=True)
    with pytest.raises(ResplitError) as caught:
        step(known)
    assert (caught.value.code, caught.value.field) == (code, field), caught.value.message
    assert known == before


# Documents that several sign


def test_a_document_opens_once_a_threshold_has_signed() -> None:
    one = sign(ROOT, ROOT_TYPE, keys(1))
    with pytest.raises(ResplitError, match="carries 1 valid signatures of the 2") as caught:
        open_signed(one, RootKeys, ROOT_TYPE, ROOT.public_keys, 2)
    assert caught.value.code is ErrorCode.BAD_SIGNATURE
    assert open_signed(countersign(one, ROOT_TYPE, keys(3)), RootKeys, ROOT_TYPE, ROOT.public_keys, 2) == ROOT


def test_signing_one_after_another_is_signing_together() -> None:
    assert countersign(sign(ROOT, ROOT_TYPE, keys(2)), ROOT_TYPE, keys(1)) == sign(ROOT, ROOT_TYPE, TWO)


def test_a_key_id_is_half_of_the_hash_of_the_raw_key() -> None:
    raw = key(1).public_key().public_bytes_raw()
    assert key_id(key(1).public_key()) == sha256(raw).digest()[:16].hex()


def test_every_signature_is_dsse_over_the_bytes_that_travel() -> None:
    kind, payload, *pairs = msgpack.unpackb(sign(ROOT, ROOT_TYPE, TWO))
    assert (kind, pairs[::2]) == (ROOT_TYPE, sorted(TWO))
    for name, signature in zip(pairs[::2], pairs[1::2], strict=True):
        TWO[name].public_key().verify(signature, pae(kind, payload))


def test_a_key_counts_once_however_often_it_signs() -> None:
    kind, payload, name, signature = msgpack.unpackb(sign(ROOT, ROOT_TYPE, keys(1)))
    twice = msgpack.packb([kind, payload, name, signature, name, signature])
    with pytest.raises(ResplitError, match="1 valid signatures of the 2"):
        open_signed(twice, RootKeys, ROOT_TYPE, ROOT.public_keys, 2)
    # Nor under two names, should a list of keys hold one twice.
    under_two_names = msgpack.packb([kind, payload, "x", signature, "y", signature])
    listed = {"x": key(1).public_key(), "y": key(1).public_key()}
    with pytest.raises(ResplitError, match="1 valid signatures of the 2"):
        open_signed(under_two_names, RootKeys, ROOT_TYPE, listed, 2)


def test_a_stranger_s_signature_counts_for_nothing() -> None:
    with pytest.raises(ResplitError, match="1 valid signatures of the 2"):
        open_signed(sign(ROOT, ROOT_TYPE, keys(1, 9)), RootKeys, ROOT_TYPE, ROOT.public_keys, 2)
    assert open_signed(sign(ROOT, ROOT_TYPE, keys(1, 2, 9)), RootKeys, ROOT_TYPE, ROOT.public_keys, 2) == ROOT


def test_a_document_of_one_kind_never_passes_as_another() -> None:
    data = sign(ROOT, ROOT_TYPE, TWO)
    with pytest.raises(ResplitError, match="where"):
        open_signed(data, Roster, ROSTER_TYPE, ROOT.public_keys, 2)
    relabelled = msgpack.packb([ROSTER_TYPE, *msgpack.unpackb(data)[1:]])
    with pytest.raises(ResplitError, match="0 valid signatures"):
        open_signed(relabelled, Roster, ROSTER_TYPE, ROOT.public_keys, 2)


def test_nothing_is_parsed_before_enough_signatures_hold() -> None:
    signatures = {name: holder.sign(pae(ROOT_TYPE, b"{")) for name, holder in TWO.items()}
    flat = [part for pair in signatures.items() for part in pair]
    for count, code in ((2, ErrorCode.BAD_SIGNATURE), (4, ErrorCode.INVALID_REQUEST)):
        with pytest.raises(ResplitError) as caught:
            open_signed(msgpack.packb([ROOT_TYPE, b"{", *flat[:count]]), RootKeys, ROOT_TYPE, ROOT.public_keys, 2)
        assert caught.value.code is code


SIGNED = sign(ROOT, ROOT_TYPE, TWO)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb([ROOT_TYPE]),
        msgpack.packb([ROOT_TYPE, "{}"]),
        msgpack.packb([ROOT_TYPE, b"{}", "name"]),
        msgpack.packb([ROOT_TYPE, b"{}", b"name", b""]),
        msgpack.packb([ROOT_TYPE, b"{}", ["name", b""]]),
        msgpack.packb([ROOT_TYPE, b"{}", [[[]]], b""]),
        msgpack.packb({"payload": b""}),
        msgpack.packb([ROOT_TYPE, b"{}", *(["name", b""] * (SIGNATURES_MAX + 1))]),
        SIGNED + b"\0",
        SIGNED[:-1],
        b"\0" * (MAX_DOCUMENT_BYTES + 1),
    ],
)
def test_what_is_no_signed_document_is_refused(data: bytes) -> None:
    with pytest.raises(ResplitError) as caught:
        open_signed(data, RootKeys, ROOT_TYPE, ROOT.public_keys, 2)
    assert caught.value.code is ErrorCode.BAD_SIGNATURE


def test_no_more_sign_than_a_document_takes() -> None:
    full = sign(ROOT, ROOT_TYPE, keys(*range(1, SIGNATURES_MAX + 1)))
    with pytest.raises(ResplitError, match=f"takes {SIGNATURES_MAX} signatures"):
        countersign(full, ROOT_TYPE, keys(99))


# What the values themselves refuse


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: root(1, TWO, 3), "3 signatures cannot come from 2 keys"),
        (lambda: root(1, TWO, 1, keys={"0" * 32: spelled(key(1).public_key())}), "is called"),
        (lambda: root(1, TWO, 1, expires_at=NOW - DAY), "cannot end at"),
        (lambda: root(0, TWO, 1), "greater than or equal to 1"),
        (lambda: root(1, TWO, 1, previous="0" * 64), "names the one before"),
        (lambda: root(2, TWO, 1, previous=None), "names the one before"),
        (lambda: member("n0", 1, tier=None), "agents have a tier"),
        (lambda: member("leader", 1, role="orchestrator", tier="trusted"), "agents have a tier"),
        (lambda: member("n0", 1, not_after=NOW - DAY), "cannot end at"),
        (lambda: member("n0", 1, signing="A" * 42 + "B="), "pattern"),  # spells the same bytes as "A" * 43 + "="
        (lambda: member("n0", 1, bus="A" * 56), "pattern"),
        (lambda: member("n0", 1, bus="U" + "A" * 55), "copy it whole"),
        (lambda: roster(1, member("n0", 1), member("n0", 2)), "two members are called 'n0'"),
        (lambda: roster(1, member("n0", 1), member("n1", 2, signing=member("n0", 1).signing)), "the signing key"),
        (lambda: roster(1, member("n0", 1), member("n1", 2, sealing=member("n0", 1).sealing)), "the sealing key"),
        (lambda: roster(1, member("n0", 1), member("n1", 2, bus=member("n0", 1).bus)), "the bus key"),
        (lambda: roster(1, member("n0", 1), member("n1", 2, link=member("n0", 1).link)), "the link key"),
    ],
)
def test_what_contradicts_itself_is_no_value(make: Callable[[], object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        make()


# The root


def test_a_first_root_is_one_that_a_threshold_of_its_own_keys_signed() -> None:
    assert first_known(sign(ROOT, ROOT_TYPE, TWO)) == START
    with pytest.raises(ResplitError, match="1 valid signatures of the 2"):
        first_known(sign(ROOT, ROOT_TYPE, keys(1)))
    with pytest.raises(ResplitError) as caught:
        first_known(b"")
    assert caught.value.code is ErrorCode.BAD_SIGNATURE


NEXT = root(2, keys(3, 4), 2)
OF_NEXT = sign(roster(1, root_version=2), ROSTER_TYPE, keys(3, 4))


def behind(*roots: bytes, of: bytes = OF_NEXT) -> Callable[[Known], Known]:
    """The step that takes a roster with these roots in front of it."""
    return lambda known: after_roster(known, present(roots, of), NOW)


def test_the_next_root_takes_a_threshold_of_the_old_and_of_the_new_keys() -> None:
    assert behind(sign(NEXT, ROOT_TYPE, keys(1, 3, 4)))(START).root == NEXT
    for signers in (keys(3, 4), keys(1, 2), keys(1, 2, 3), keys(1, 4)):
        refused(ErrorCode.BAD_SIGNATURE, None, START, behind(sign(NEXT, ROOT_TYPE, signers)))


def test_a_root_counts_with_a_roster_of_its_own_or_not_at_all() -> None:
    """Whoever took it alone would believe no roster at all until there is one."""
    newer = sign(NEXT, ROOT_TYPE, keys(1, 3, 4))
    refused(ErrorCode.BAD_SIGNATURE, None, AT_FIVE, behind(newer, of=signed_roster(roster(6))))
    refused(
        ErrorCode.INVALID_REQUEST, "root_version", AT_FIVE, behind(newer, of=sign(roster(6), ROSTER_TYPE, keys(3, 4)))
    )


def test_the_known_root_in_front_of_a_newer_roster_changes_nothing_else() -> None:
    known = behind(sign(NEXT, ROOT_TYPE, keys(1, 3, 4)))(AT_FIVE)
    six = sign(roster(6, root_version=2), ROSTER_TYPE, keys(3, 4))
    after = behind(sign(NEXT, ROOT_TYPE, keys(1, 2, 3, 4)), of=six)(known)
    assert (after.root, after.roster and after.roster.version) == (NEXT, 6)


def test_a_new_root_forgets_the_rosters_of_the_old_one_which_none_can_bring_back() -> None:
    after = behind(sign(NEXT, ROOT_TYPE, keys(1, 3, 4)))(AT_FIVE)
    assert (after.root, after.roster and after.roster.version) == (NEXT, 1), "versions begin where the new root says"
    assert (after.orchestrators, after.plans) == (AT_FIVE.orchestrators, AT_FIVE.plans)
    again = sign(roster(6), ROSTER_TYPE, keys(1, 2, 3, 4))
    refused(ErrorCode.INVALID_REQUEST, "root_version", after, behind(of=again))
    refused(ErrorCode.BAD_SIGNATURE, None, after, behind(of=signed_roster(roster(6))))


@pytest.mark.parametrize(
    ("found", "code", "field"),
    [
        ([root(1, HOLDERS, 2)], ErrorCode.ROLLED_BACK, "version"),
        ([SECOND, root(1, HOLDERS, 2)], ErrorCode.ROLLED_BACK, "version"),
        ([root(2, HOLDERS, 1)], ErrorCode.ROLLED_BACK, "digest"),
        ([SECOND, SECOND], ErrorCode.INVALID_REQUEST, "version"),
        ([root(3, HOLDERS, 2)], ErrorCode.INVALID_REQUEST, "version"),
        ([SECOND, root(4, HOLDERS, 2)], ErrorCode.INVALID_REQUEST, "version"),
        ([SECOND, root(3, HOLDERS, 2, previous=ROOT.digest)], ErrorCode.ROLLED_BACK, "previous"),
        ([SECOND, root(3, HOLDERS, 2, cluster=OTHER_CLUSTER)], ErrorCode.INVALID_REQUEST, "cluster"),
        ([SECOND, root(3, HOLDERS, 2, expires_at=NOW)], ErrorCode.EXPIRED, "expires_at"),
        (
            [SECOND, root(3, HOLDERS, 2, issued_at=NOW + CLOCK_BEHIND_MAX + timedelta(seconds=1))],
            ErrorCode.INVALID_REQUEST,
            "issued_at",
        ),
    ],
)
def test_a_root_that_does_not_follow_changes_nothing(found: list[RootKeys], code: ErrorCode, field: str) -> None:
    known = AT_FIVE.model_copy(update={"root": SECOND})
    of = sign(roster(6, root_version=found[-1].version), ROSTER_TYPE, HOLDERS)
    refused(code, field, known, behind(*(sign(one, ROOT_TYPE, HOLDERS) for one in found), of=of))


@pytest.mark.parametrize("front", [b"\xc0", sign(root(2, keys(4), 1), ROOT_TYPE, keys(4)), sign(ROOT, ROOT_TYPE, TWO)])
def test_who_knows_the_root_takes_no_roster_that_would_lead_nobody_else_there(front: bytes) -> None:
    third = root(3, HOLDERS, 2)
    known = AT_FIVE.model_copy(update={"root": third})
    of = sign(roster(6, root_version=3), ROSTER_TYPE, HOLDERS)
    last = sign(third, ROOT_TYPE, HOLDERS)
    assert behind(sign(SECOND, ROOT_TYPE, HOLDERS), last, of=of)(known).root == third
    refused(ErrorCode.BAD_SIGNATURE, None, known, behind(front, last, of=of))


def test_who_was_away_passes_through_roots_that_have_expired() -> None:
    second = root(2, HOLDERS, 2, expires_at=NOW)
    expired, last = sign(second, ROOT_TYPE, HOLDERS), root(3, HOLDERS, 2, previous=second.digest)
    of = sign(roster(1, root_version=3), ROSTER_TYPE, HOLDERS)
    assert behind(expired, sign(last, ROOT_TYPE, HOLDERS), of=of)(START).root == last
    of = sign(roster(1, root_version=2), ROSTER_TYPE, HOLDERS)
    refused(ErrorCode.EXPIRED, "expires_at", START, behind(expired, of=of))


def test_there_is_an_end_to_the_roots_that_are_looked_at() -> None:
    many = present([sign(NEXT, ROOT_TYPE, keys(1, 3, 4))] * ROOTS_MAX, OF_NEXT)
    refused(ErrorCode.BAD_SIGNATURE, None, START, lambda known: after_roster(known, many, NOW))


# Rosters


def test_what_is_remembered_of_a_roster_is_its_version_its_digest_and_who_orchestrates() -> None:
    assert AT_FIVE.roster is not None
    assert (AT_FIVE.roster.version, AT_FIVE.roster.digest) == (5, roster(5).digest)
    assert AT_FIVE.orchestrators == (LEADER.signing,)
    assert START.roster is None


def test_a_newer_roster_is_taken_and_the_same_one_changes_nothing() -> None:
    newer = after_roster(AT_FIVE, signed_roster(roster(6)), NOW)
    assert newer.roster is not None
    assert newer.roster.version == 6
    assert after_roster(newer, sign(roster(6), ROSTER_TYPE, HOLDERS), NOW) == newer  # whoever else has signed it
    assert after_roster(AT_FIVE, signed_roster(roster(5 + JUMP_MAX)), NOW).roster is not None


@pytest.mark.parametrize(
    ("found", "code", "field"),
    [
        (roster(4), ErrorCode.ROLLED_BACK, "version"),
        (roster(5, EDGE), ErrorCode.ROLLED_BACK, "digest"),
        (roster(6 + JUMP_MAX), ErrorCode.INVALID_REQUEST, "version"),
        (roster(6, expires_at=NOW, issued_at=NOW - DAY), ErrorCode.EXPIRED, "expires_at"),
        (roster(6, cluster=OTHER_CLUSTER), ErrorCode.INVALID_REQUEST, "cluster"),
        (roster(6, root_version=2), ErrorCode.INVALID_REQUEST, "root_version"),
        (
            roster(6, issued_at=NOW + CLOCK_BEHIND_MAX + timedelta(seconds=1)),
            ErrorCode.INVALID_REQUEST,
            "issued_at",
        ),
    ],
)
def test_a_roster_that_does_not_follow_changes_nothing(found: Roster, code: ErrorCode, field: str) -> None:
    refused(code, field, AT_FIVE, lambda known: after_roster(known, signed_roster(found), NOW))


def test_a_roster_that_too_few_signed_changes_nothing() -> None:
    data = sign(roster(6), ROSTER_TYPE, keys(1, 9))
    refused(ErrorCode.BAD_SIGNATURE, None, AT_FIVE, lambda known: after_roster(known, data, NOW))


def test_a_roster_frozen_past_its_time_is_refused_though_it_was_taken_before() -> None:
    data = signed_roster(roster(5))
    assert after_roster(AT_FIVE, data, NOW + 29 * DAY) == AT_FIVE
    refused(ErrorCode.EXPIRED, "expires_at", AT_FIVE, lambda known: after_roster(known, data, NOW + 30 * DAY))


def test_no_roster_outlives_its_root() -> None:
    data = signed_roster(roster(6, expires_at=NOW + 999 * DAY))
    refused(ErrorCode.EXPIRED, "expires_at", AT_FIVE, lambda known: after_roster(known, data, NOW + 365 * DAY))


def test_a_roster_can_be_opened_out_of_its_time_to_be_renewed() -> None:
    old = roster(5, issued_at=NOW - 2 * DAY, expires_at=NOW - DAY)
    assert open_roster(ROOT, signed_roster(old)) == old


def test_members_are_those_whose_time_it_is() -> None:
    late = member("late", 20, not_before=NOW + timedelta(hours=1))
    over = member("over", 21, not_after=NOW)
    everyone = roster(1, LEADER, EDGE, late, over, TRUSTED)
    assert members_at(everyone, "agent", NOW) == (EDGE, TRUSTED)
    assert members_at(everyone, "agent", NOW + timedelta(hours=1)) == (EDGE, late, TRUSTED)
    assert members_at(everyone, "orchestrator", NOW) == (LEADER,)
    assert members_at(everyone, "client", NOW) == ()
    assert everyone.member(NodeId("n0")) == EDGE
    assert everyone.member(NodeId("gone")) is None


# Plans

SEEN = after_plan(START, CHAT, term=3, revision=7, event=PLAN)


def test_the_highest_term_and_revision_of_each_deployment_are_remembered() -> None:
    both = after_plan(SEEN, DeploymentName("other"), term=1, revision=1, event=OTHER_PLAN)
    assert both.plans == {
        CHAT: PlanSeen(term=3, revision=7, digest=PLAN),
        DeploymentName("other"): PlanSeen(term=1, revision=1, digest=OTHER_PLAN),
    }
    assert after_plan(SEEN, CHAT, term=3, revision=7, event=PLAN) == SEEN
    assert after_plan(SEEN, CHAT, term=4, revision=1, event=OTHER_PLAN).plans[CHAT].term == 4
    assert after_plan(SEEN, CHAT, term=3 + JUMP_MAX, revision=1, event=OTHER_PLAN) != SEEN


@pytest.mark.parametrize(
    ("term", "revision", "event", "code", "field"),
    [
        (2, 8, OTHER_PLAN, ErrorCode.ROLLED_BACK, "term"),
        (3, 6, OTHER_PLAN, ErrorCode.ROLLED_BACK, "revision"),
        (3, 7, OTHER_PLAN, ErrorCode.ROLLED_BACK, "digest"),
        (4 + JUMP_MAX, 8, OTHER_PLAN, ErrorCode.INVALID_REQUEST, "term"),
    ],
)
def test_a_plan_event_that_does_not_follow_changes_nothing(
    term: int, revision: int, event: Digest, code: ErrorCode, field: str
) -> None:
    refused(code, field, SEEN, lambda known: after_plan(known, CHAT, term, revision, event))


def test_no_more_deployments_are_remembered_than_there_is_room_for() -> None:
    full = START.model_copy(
        update={"plans": {DeploymentName(f"d{n}"): SEEN.plans[CHAT] for n in range(DEPLOYMENTS_MAX)}}
    )
    refused(ErrorCode.INVALID_REQUEST, "deployment", full, lambda known: after_plan(known, CHAT, 1, 1, PLAN))
    assert after_plan(full, DeploymentName("d0"), 3, 8, OTHER_PLAN) != full


def test_plans_are_forgotten_once_no_key_is_left_that_could_sign_them_again() -> None:
    seen = after_plan(AT_FIVE, CHAT, term=3, revision=7, event=PLAN)
    second = member("second", 30, role="orchestrator", tier=None)

    def taken(known: Known, version: int, *orchestrators: Member) -> Known:
        return after_roster(known, signed_roster(roster(version, EDGE, *orchestrators)), NOW)

    assert taken(seen, 6, LEADER, second).plans == seen.plans
    assert taken(taken(seen, 6, LEADER, second), 7, second).plans == seen.plans
    assert taken(seen, 6, second).plans == {}
    # A roster without any orchestrator does not hide that the one before comes back.
    assert taken(taken(seen, 6), 7, LEADER).plans == seen.plans
    assert taken(taken(seen, 6), 7, second).plans == {}


# Policy


@pytest.mark.parametrize(
    ("sensitive", "node", "blocks", "expected"),
    [
        ({}, "n0", range(8), set()),
        ({"chat": "ends"}, "n0", range(8), {0, 7}),
        ({"chat": "ends"}, "n0", range(2, 6), set()),
        ({"chat": "ends"}, "n1", range(8), set()),
        ({"other": "all"}, "n0", range(8), set()),
        ({"*": "all"}, "n0", (3, 4), {3, 4}),
        ({"*": (0, 1), "chat": (1, 2)}, "n0", range(8), {0, 1, 2}),
        ({"*": "all", "chat": ()}, "n0", (3,), {3}),  # one deployment cannot be excepted from what holds for all
        ({}, "gone", (3, 4), {3, 4}),
        ({}, "leader", (3, 4), {3, 4}),
    ],
)
def test_what_a_node_must_not_hold(
    sensitive: dict[str, Sensitive], node: str, blocks: range | tuple[int, ...], expected: set[int]
) -> None:
    policy = Policy(sensitive=sensitive)
    assert forbidden(policy, roster(1), CHAT, 8, NodeId(node), blocks) == expected


def test_a_policy_names_deployments_and_nothing_else() -> None:
    with pytest.raises(ValidationError):
        Policy(sensitive={"a.b": "all"})
    with pytest.raises(ValidationError):
        Policy(sensitive={"**": "all"})


# Keys that left


def former(number: int, **changes: Any) -> Former:
    fields = {
        "name": "n9",
        "role": "agent",
        "signing": base64.b64encode(number.to_bytes(32, "big")).decode(),
        "out": 2,
        "until": NOW,
    }
    return Former.model_validate(fields | changes)


def test_a_roster_of_an_earlier_release_has_the_digest_that_processes_remember() -> None:
    """Canonical bytes: what nobody set is not in them."""
    found = roster(5)
    assert found.former is None
    assert b"former" not in encode(found)
    assert decode(Roster, encode(found), "roster").digest == found.digest


def test_only_writers_keys_are_kept_and_each_once() -> None:
    person = member("anna", 13, role="operator", tier=None)
    before = roster(5, LEADER, EDGE, person)
    rotated = member("n0", 14)
    after = former_after(before, (LEADER, rotated), NOW)
    assert after is not None
    assert [(one.name, one.signing, one.out, one.until) for one in after] == [("n0", EDGE.signing, 6, NOW)]
    assert former_after(roster(6, LEADER, rotated, former=after), (LEADER, rotated), NOW) == after


@pytest.mark.parametrize("signing", [EDGE.signing, former(1).signing])
def test_a_key_that_left_never_comes_back(signing: str) -> None:
    with pytest.raises(ValidationError, match="never comes back"):
        roster(5, LEADER, EDGE, former=(former(1), former(2, signing=signing)))


def test_of_too_many_former_keys_the_one_that_left_first_is_forgotten() -> None:
    left = tuple(former(number) for number in range(FORMER_MAX))
    after = former_after(roster(5, EDGE, former=left), (), NOW)
    assert after is not None and len(after) == FORMER_MAX
    assert after[:-1] == left[1:] and after[-1].signing == EDGE.signing


def test_a_roster_at_its_largest_fits_into_one_signed_document() -> None:
    members = tuple(
        EDGE.model_copy(
            update={
                "name": f"n{number}".ljust(63, "x"),
                "signing": former(10_000 + number).signing,
                "sealing": former(number).signing,
                "bus": public_nkey(nkey_seed(number.to_bytes(SEED_BYTES, "big"))),
                "link": sha256(b"%d" % number).hexdigest(),
            }
        )
        for number in range(MEMBERS_MAX)
    )
    left = tuple(former(number, name="n".ljust(63, "x"), role="orchestrator") for number in range(FORMER_MAX))
    assert len(signed_roster(roster(5, *members, former=left))) < MAX_DOCUMENT_BYTES
