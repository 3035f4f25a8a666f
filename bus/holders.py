"""Who holds the root of a cluster: several who sign one after another, and others in the place of some of them.

What waits for signatures (`bus.cluster_folder.PENDING`) is carried to the other holders, who read (`review`) and sign
it (`countersign_pending`), and back (`adopt`). A new root goes the same way, in front of a roster that is signed under
it: a threshold of the holders before it signs the root, one of its own holders the root and the roster.

Each holder has the key of the cluster's certificate authority too. That stays the same under a new root, or every
member would need new keys: who was a holder cannot say any more who belongs, but can still make certificates.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from bus.cluster_folder import check_unchanged, open_cluster, propose, put_in_force, signers_of
from bus.enrolment import next_roster
from bus.folders import ROSTER, read_public, read_root
from bus.founding import ROOT_LIFETIME, Holder, check_passphrases, keep_holder
from schemas.errors import ErrorCode, ResplitError
from schemas.known import root_of
from schemas.roster import (
    ROOT_TYPE,
    ROSTER_TYPE,
    RootKeys,
    Roster,
    check_cluster,
    open_roster,
    present,
    presented,
    spelled,
)
from schemas.signed import KeyId, countersign, key_id, open_signed, sign


class Draft(NamedTuple):
    """A change that at least one holder has signed."""

    before: RootKeys
    """Whose holders must sign the root."""
    root: RootKeys
    """Whose holders must sign the roster; the same as `before` where the root does not change."""
    roster: Roster


def replace_holders(
    folder: Path,
    roots: Sequence[Holder],
    *,
    staying: Collection[KeyId],
    added: int,
    threshold: int,
    passphrases: Sequence[str] = (),
    now: datetime,
) -> tuple[Roster, tuple[Path, ...]]:
    """Make the next version of the root: those holders who are `staying`, and `added` new ones, of whom `threshold`
    sign. The roster that is to be in force under it, which says nothing else than the one before, and the files of the
    new holders. `roots` sign, those who leave among them; where they are too few it is pending, as any change.

    Raises `ResplitError(INVALID_REQUEST)` for who is no holder, for numbers that do not fit, where nobody signs who is
    one afterwards, and where a change is still pending.
    """
    cluster = open_cluster(folder)
    before = cluster.root
    signers = signers_of(before, roots)
    check_unchanged(cluster)
    check_passphrases(passphrases, added)
    if strangers := sorted(set(staying) - set(before.keys)):
        message = f"{strangers[0]} holds no key of the root; its holders are {', '.join(sorted(before.keys))}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "keep")
    made = [Ed25519PrivateKey.generate() for _ in range(added)]
    new = {key_id(key.public_key()): key for key in made}
    stay = {name: key for name, key in before.keys.items() if name in staying}
    try:
        root = RootKeys(
            cluster=before.cluster,
            version=before.version + 1,
            previous=before.digest,
            keys=stay | {name: spelled(key.public_key()) for name, key in new.items()},
            threshold=threshold,
            issued_at=now,
            expires_at=now + ROOT_LIFETIME,
        )
    except ValidationError as error:
        raise ResplitError.from_validation(error, "root") from error
    remaining = {name: key for name, key in (signers | new).items() if name in root.keys}
    if not remaining:
        message = "nobody signs who will be a holder; bring the file of one who stays"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "roots")
    roster = next_roster(cluster, root, cluster.roster.members, cluster.roster.policy, now)
    files = tuple(folder / f"root-{root.version}.{number}.key" for number in range(added))
    for position, (path, key) in enumerate(zip(files, made, strict=True)):
        keep_holder(path, Holder(key, roots[0].authority), passphrases[position] if passphrases else None)
    signed = sign(root, ROOT_TYPE, signers | new)
    propose(cluster, present((*cluster.roots, signed), sign(roster, ROSTER_TYPE, remaining)))
    return roster, files


def review(data: bytes, folder: Path) -> Draft:
    """What waits in `data`, for the eyes of the next holder, whose `folder` has what is public of the cluster.

    Raises `ResplitError(BAD_SIGNATURE)` where no holder vouches for it.
    """
    known = read_root(folder).root
    if (folder / ROSTER).exists():
        known = root_of(known, read_public(folder / ROSTER))
    roots, roster = presented(data)
    try:
        root = before = root_of(known, data)
    except ResplitError as error:
        if error.code is not ErrorCode.BAD_SIGNATURE or not roots:
            raise
        # The last root may be what waits for signatures.
        before = root_of(known, present(roots[:-1], roster))
        root = open_signed(roots[-1], RootKeys, ROOT_TYPE, before.public_keys, 1)
        check_cluster("root", before.cluster, root.cluster)
    return Draft(before, root, open_roster(root.model_copy(update={"threshold": 1}), data))


def countersign_pending(data: bytes, folder: Path, roots: Sequence[Holder]) -> bytes:
    """Add the signatures of the holders `roots` to what waits in `data`; errors are those of `review`."""
    draft = review(data, folder)
    signers = signers_of(draft.before, roots, draft.root)
    documents, roster = presented(data)
    if draft.root != draft.before:
        documents = (*documents[:-1], countersign(documents[-1], ROOT_TYPE, signers))
    of_roster = {name: key for name, key in signers.items() if name in draft.root.keys}
    return present(documents, countersign(roster, ROSTER_TYPE, of_roster))


def adopt(folder: Path, data: bytes) -> Roster:
    """Make the roster `data` the cluster's, now that enough holders have signed it; it is pending no more.

    Raises `ResplitError(BAD_SIGNATURE)` where signatures are missing and ROLLED_BACK where it is not the next one.
    """
    cluster = open_cluster(folder)
    roster = open_roster(root_of(cluster.root, data), data)
    if roster.version != cluster.roster.version + 1 and roster != cluster.roster:
        message = f"the roster is version {roster.version} and the cluster has version {cluster.roster.version}"
        raise ResplitError(ErrorCode.ROLLED_BACK, message, "version")
    pending = cluster.pending
    is_over = pending.exists() and review(read_public(pending), folder).roster.version <= roster.version
    put_in_force(cluster, data)
    if is_over:
        pending.unlink()
    return roster
