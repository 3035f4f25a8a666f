"""Whatever is done to what a real cluster signed, nobody takes it: not one mutation in a hundred thousand.

Envelopes have no unsigned bytes that count for nothing: what `msgpack` could spell differently, the reader refuses
(`schemas.flat`). Of a roster the signatures are not signed themselves, so one that is added beside the root's opens as
what the root signed; that it is no news then is a test of its own.
"""

import asyncio
from collections.abc import Iterator

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.folders import ROSTER
from bus.identity import Identity
from schemas.envelope import AUDIT_TYPE, HEARTBEAT_TYPE, RECEIPT_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import ROSTER_TYPE
from schemas.signed import key_id
from tests.security.mutating import damaged, forged, reframed
from tests.security.recording import KINDS, N0, N1, Recording, believed

STRANGER = Ed25519PrivateKey.from_private_bytes(b"\3" * 32)
OF_AGENTS = (AUDIT_TYPE, HEARTBEAT_TYPE, RECEIPT_TYPE)
LOOSE = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors)
SHORT = settings(max_examples=2500, deadline=None, suppress_health_check=LOOSE)
FEW = settings(max_examples=500, deadline=None, suppress_health_check=LOOSE)
LONG = settings(max_examples=100_000, deadline=None, suppress_health_check=LOOSE)
LONG_S = 3600


class Real:
    """An agent of the recorded cluster, the genuine envelopes, and the keys of others that forgers may have."""

    def __init__(self, recording: Recording) -> None:
        self.n0 = recording.identity(N0)
        self.genuine = recording.envelopes(self.n0)
        self.envelopes = tuple(data for kind in self.genuine.values() for data in kind)
        self.roster = recording.roster
        # Of one kind there may be hundreds: each kind is drawn as often as any other.
        self.places = {
            kind: tuple(i for i, data in enumerate(self.envelopes) if data in self.genuine[kind]) for kind in KINDS
        }
        self.thieves = (STRANGER, recording.identity(N1).key)

    def takes(self, data: bytes) -> bool:
        """Whether any reader of envelopes takes these bytes; what it says otherwise is that nobody vouches for them."""
        for kind, held in KINDS.items():
            try:
                open_envelope(data, held, kind, believed(self.n0, kind))
            except ResplitError as error:
                assert error.code is ErrorCode.BAD_SIGNATURE
            else:
                return True
        return False


@pytest.fixture(scope="module")
def real(recording: Recording) -> Real:
    return Real(recording)


def mutants(real: Real) -> st.SearchStrategy[bytes]:
    """Envelopes of all kinds, none of them as it was signed."""
    return (
        st.sampled_from([places for places in real.places.values() if places])
        .flatmap(st.sampled_from)
        .flatmap(
            lambda at: st.one_of(
                damaged(real.envelopes[at]),
                reframed(real.envelopes[at]),
                forged(real.envelopes, at, real.thieves[:1]),
                forged(real.envelopes, at, real.thieves[:1]),
            )
        )
        .filter(lambda data: data not in real.envelopes)
    )


def test_every_kind_of_envelope_was_recorded_and_is_taken_as_it_was_signed(real: Real) -> None:
    for kind, envelopes in real.genuine.items():
        assert envelopes, f"nobody signed any {kind}"
        assert all(real.takes(data) for data in envelopes)


@pytest.mark.parametrize("how", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(LONG_S)])])
def test_no_mutated_envelope_is_taken(real: Real, how: settings) -> None:
    before = disk(real.n0)
    handed: list[int] = []

    @how
    @given(data=mutants(real))
    def refuse(data: bytes) -> None:
        assert not real.takes(data)
        handed.append(hash(data))

    refuse()
    assert len(handed) >= how.max_examples
    assert len(set(handed)) > len(handed) // 2, "too many of them are the same"
    assert disk(real.n0) == before


@pytest.mark.slow
def test_no_envelope_with_one_bit_changed_or_its_end_cut_off_is_taken(real: Real) -> None:
    """All of them, of one envelope of each kind."""
    for envelopes in real.genuine.values():
        shortest = min(envelopes, key=len)
        for at in range(len(shortest)):
            assert not real.takes(shortest[:at])
            for bit in range(8):
                assert not real.takes(shortest[:at] + bytes([shortest[at] ^ 1 << bit]) + shortest[at + 1 :])


@settings(max_examples=300, deadline=None, suppress_health_check=LOOSE)
@given(data=st.data())
def test_another_spelling_of_the_same_signed_parts_is_not_taken(real: Real, data: st.DataObject) -> None:
    """Its digest would be another, and the log's own event be refused as a forgery of it after a restart."""
    genuine = data.draw(st.sampled_from(real.envelopes))
    mutant = data.draw(reframed(genuine))
    assert msgpack.unpackb(mutant) == msgpack.unpackb(genuine)
    assert not real.takes(mutant)


@FEW
@given(data=st.data())
def test_a_member_signs_for_itself_and_in_its_role_alone(real: Real, data: st.DataObject) -> None:
    """Whoever has n1's key says what n1 may say, and nothing as an orchestrator or as n0."""
    at = data.draw(st.integers(0, len(real.envelopes) - 1))
    mutant = data.draw(forged(real.envelopes, at, real.thieves[1:]).filter(lambda data: data not in real.envelopes))
    for kind, held in KINDS.items():
        try:
            _, signer = open_envelope(mutant, held, kind, believed(real.n0, kind))
        except ResplitError:
            continue
        assert (signer, kind in OF_AGENTS) == (N1, True)


def disk(identity: Identity) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(identity.folder.iterdir())}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as running:
        yield running


def test_no_mutated_roster_is_taken(real: Real, runner: asyncio.Runner) -> None:
    before, roster = disk(real.n0), real.n0.roster
    kind, payload, holder, signature = msgpack.unpackb(real.roster)
    [envelope] = real.genuine[next(iter(KINDS))][:1]

    @FEW
    @given(
        mutant=st.one_of(
            damaged(real.roster), reframed(real.roster), forged([real.roster, envelope], 0, real.thieves)
        ).filter(lambda data: data != real.roster)
    )
    def refuse(mutant: bytes) -> None:
        try:
            news = runner.run(real.n0.take_roster(mutant))
        except ResplitError as error:
            assert error.code is ErrorCode.BAD_SIGNATURE
        else:
            assert not news, "it opened as what was signed"
            assert msgpack.unpackb(mutant)[:2] == [kind, payload]
            assert (holder, signature) in zip(msgpack.unpackb(mutant)[2::2], msgpack.unpackb(mutant)[3::2], strict=True)

    refuse()
    assert (disk(real.n0), real.n0.roster) == (before, roster)


async def test_a_stranger_s_signature_beside_the_root_s_is_no_news(real: Real) -> None:
    before, roster = disk(real.n0), real.n0.roster
    parts = msgpack.unpackb(real.roster)
    assert parts[0] == ROSTER_TYPE
    for name, signature in ((key_id(STRANGER.public_key()), b"\0" * 64), ("", b""), (parts[2], b"")):
        beside = msgpack.packb([*parts, name, signature])
        assert not await real.n0.take_roster(beside)
    assert (disk(real.n0), real.n0.roster) == (before, roster)
    assert (real.n0.folder / ROSTER).read_bytes() == real.roster
