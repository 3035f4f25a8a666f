"""Whatever is done to the bytes of a signed document or a bundle: it opens as what was signed, or not at all."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.enrolment import enrol
from bus.folders import FIRST_ROOT
from bus.founding import found_cluster, load_holder
from bus.joining import join
from schemas.base import DeploymentName, Digest, NodeId
from schemas.envelope import pae
from schemas.errors import ErrorCode, ResplitError
from schemas.known import JUMP_MAX, Known, after_plan, after_roster, first_known, root_of
from schemas.roster import ROOT_TYPE, ROSTER_TYPE, Roster, open_roster, present, spelled
from schemas.signed import key_id, sign
from tests.security.mutating import damaged

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
HOLDERS = {key_id(key.public_key()): key for key in map(Ed25519PrivateKey.from_private_bytes, (b"\1" * 32, b"\2" * 32))}
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\3" * 32)
CHAT = DeploymentName("chat")


class Real:
    """A cluster of which two of three must sign, made once by the code that makes them, with documents of each kind."""

    def __init__(self, folder: Path) -> None:
        found_cluster(folder / "cluster", now=NOW, holders=3, threshold=2)
        three = [load_holder(folder / "cluster" / f"root-{number}.key").signing for number in range(3)]
        two = [load_holder(folder / "cluster" / f"root-{number}.key") for number in (0, 2)]
        self.start = first_known((folder / "cluster" / FIRST_ROOT).read_bytes())
        self.bundle = enrol(folder / "cluster", NodeId("n0"), "agent", "edge", timedelta(days=30), two, now=NOW)
        self.roster = (folder / "cluster" / "roster.signed").read_bytes()
        self.known = after_roster(self.start, self.roster, NOW)
        self.folder = folder / "n0"
        self.joined = join(self.bundle, self.folder, NOW)
        holders = {key_id(key.public_key()): key for key in three[:2]}
        self.first = sign(self.start.root, ROOT_TYPE, holders)
        version = {
            "version": 2,
            "previous": self.start.root.digest,
            "keys": {name: spelled(key.public_key()) for name, key in HOLDERS.items()},
        }
        self.root = sign(self.start.root.model_copy(update=version), ROOT_TYPE, holders | HOLDERS)
        self.other_roster = sign(self._next_roster(3), ROSTER_TYPE, holders)
        of_root = self._next_roster(3).model_copy(update={"root_version": 2})
        self.under_next = present([self.root], sign(of_root, ROSTER_TYPE, HOLDERS))
        self.void = sign(self._next_roster(3), ROSTER_TYPE, dict([next(iter(holders.items()))]))

    def _next_roster(self, version: int) -> Roster:
        return open_roster(self.start.root, self.roster).model_copy(update={"version": version})


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    return Real(tmp_path_factory.mktemp("real"))


def content(folder: Path) -> dict[str, bytes]:
    """What each file says: of the key whose bits X25519 does not all look at, its public half."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    sealing = load_pem_private_key(found["n0.sealing.key"], None)
    assert isinstance(sealing, X25519PrivateKey)
    return found | {"n0.sealing.key": sealing.public_key().public_bytes_raw()}


def is_refused(known: Known, data: bytes) -> None:
    """By every reader there is, as badly signed, and `known` is what it was."""
    before = known.model_copy(deep=True)
    for read in (
        lambda: after_roster(known, data, NOW),
        lambda: open_roster(root_of(known.root, data), data),
    ):
        with pytest.raises(ResplitError) as caught:
            read()
        assert caught.value.code is ErrorCode.BAD_SIGNATURE
    assert known == before


@given(data=st.data())
@settings(max_examples=600, deadline=None)
def test_no_mutated_document_is_accepted(real: Real, data: st.DataObject) -> None:
    document = data.draw(st.sampled_from([real.roster, real.other_roster, real.root, real.under_next]))
    is_refused(real.known, data.draw(damaged(document)))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_first_root_is_accepted_but_as_it_was_signed(real: Real, data: st.DataObject) -> None:
    """Nobody knows its keys yet, so a mutated one may be refused for its form before it is for its signatures."""
    with pytest.raises(ResplitError) as caught:
        first_known(data.draw(damaged(real.first)))
    assert caught.value.code in (ErrorCode.BAD_SIGNATURE, ErrorCode.INVALID_REQUEST)


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_signatures_count_for_the_document_and_the_key_that_they_are_of(real: Real, data: st.DataObject) -> None:
    """Signatures of real documents, and a stranger's, in any number and order under any names: two holders' or none."""
    documents = [real.roster, real.other_roster, real.root, real.void]
    kind, payload, *own = msgpack.unpackb(real.other_roster)
    names = [*real.known.root.keys, key_id(STRANGER.public_key())]
    foreign = [part for document in documents for part in msgpack.unpackb(document)[3::2]]
    signatures = st.sampled_from([*foreign, STRANGER.sign(pae(kind, payload)), b"", b"\0" * 64])
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(names), signatures), max_size=16))
    found = msgpack.packb([kind, payload, *(part for pair in pairs for part in pair)])
    genuine = set(pairs) & set(zip(own[::2], own[1::2], strict=True))
    if len(genuine) >= real.known.root.threshold:
        assert open_roster(real.known.root, found).version == 3
    else:
        is_refused(real.known, found)


@given(copies=st.integers(1, 16), name=st.booleans())
@settings(max_examples=30, deadline=None)
def test_one_holder_is_one_however_often_it_signs(real: Real, copies: int, name: bool) -> None:
    kind, payload, signer, signature = msgpack.unpackb(real.void)
    others = [other for other in real.known.root.keys if other != signer]
    pairs = [(signer, signature), *([(others[0] if name else signer, signature)] * (copies - 1))]
    is_refused(real.known, msgpack.packb([kind, payload, *(part for pair in pairs for part in pair)]))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_bundle_joins_as_the_one_that_was_made_or_writes_nothing(
    real: Real, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Some bytes have several spellings, such as a private key beside which stands its public half, or does not."""
    folder = tmp_path_factory.mktemp("joining") / "n0"
    changed = data.draw(damaged(real.bundle))
    try:
        joined = join(changed, folder, NOW)
    except ResplitError:
        assert not folder.exists()
    else:
        assert joined == real.joined
        assert content(folder) == content(real.folder)


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["1" * 64, "2" * 64])), max_size=30
    )
)
@settings(max_examples=150, deadline=None)
def test_what_is_remembered_of_plans_never_goes_back_or_far_ahead(
    real: Real, steps: list[tuple[int, int, str]]
) -> None:
    known = real.known
    for term, revision, event in steps:
        before = known.plans.get(CHAT)
        try:
            known = after_plan(known, CHAT, term, revision, Digest(event))
        except ResplitError:
            assert known.plans.get(CHAT) == before
        else:
            seen = known.plans[CHAT]
            assert (seen.term, seen.revision, seen.digest) == (term, revision, event)
            if before is not None:
                assert before.term <= seen.term <= before.term + JUMP_MAX
                assert (before.term, before.revision) <= (seen.term, seen.revision)
                assert (before.term, before.revision) < (seen.term, seen.revision) or seen.digest == before.digest
