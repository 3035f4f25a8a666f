"""The folder of a cluster, on the operator's machine and off the bus: what it says, and how a change comes to hold.

It holds `root-0.key` and so on, one file for each holder, which may be taken to machines of their own; and what is
public: `root.1.signed`, `roster.signed` (the newest, and in front of it the later roots), `ca.pem`; `nats-server.conf`
with the server's certificate (`bus.server_certificate`), whose key is the one other secret here, and `logins.conf`
which goes with the roster: whom the cluster's nats-server lets in. Where there are several servers, each has a folder
of its own in `servers` (`bus.servers`).

Each change is a new version of the roster. Where fewer holders sign it than it takes, it waits as `roster.pending`
until the others have (`bus.holders`), and is not in force.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bus.certificates import fingerprint
from bus.credentials import Login, logins_of
from bus.folders import FIRST_ROOT, ROSTER, read_public
from bus.founding import Holder
from bus.natsconf import LOGINS_FILE, LeafLogin, leaf_logins_conf, logins_conf
from bus.remembered import PUBLIC, write_durably
from natstls.contexts import AUTHORITY
from schemas.base import SiteId
from schemas.errors import ErrorCode, ResplitError
from schemas.known import first_known, root_of
from schemas.roster import RootKeys, Roster, open_roster, presented
from schemas.signed import KeyId, key_id

PENDING = "roster.pending"
SERVERS = "servers"
"""The folders of NATS servers, where there are several, each called like its server."""
LEAF_LOGIN, LEAF_SEED = "leaf.pub", "leaf.key"
"""The NKey of a leaf node, by which its folder is known, and with what it logs in, which only its machine needs."""
HOME = "home"
"""An empty file by which the folder of a leaf node is known whose site is the home of deployments."""
Signers = dict[KeyId, Ed25519PrivateKey]


@dataclass(frozen=True)
class Cluster:
    """What the folder says, verified, whether or not it has expired: an expired roster must be renewable."""

    folder: Path
    first: bytes
    """The first version of the root."""
    data: bytes
    """The roster, with later versions in front of it."""
    root: RootKeys
    """The newest."""
    roster: Roster
    authority: x509.Certificate

    @property
    def roots(self) -> tuple[bytes, ...]:
        """The later versions of the root."""
        return presented(self.data)[0]

    @property
    def pending(self) -> Path:
        """Where a change waits for signatures."""
        return self.folder / PENDING


def open_cluster(folder: Path) -> Cluster:
    """Read the folder; raises `ResplitError` naming the file that is missing or bad."""
    first, data = read_public(folder / FIRST_ROOT), read_public(folder / ROSTER)
    root = root_of(first_known(first).root, data)
    roster = open_roster(root, data)
    try:
        authority = x509.load_pem_x509_certificate(read_public(folder / AUTHORITY))
    except ValueError as error:
        message = f"{folder / AUTHORITY} is not a certificate; restore it from a copy"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, AUTHORITY) from error
    if fingerprint(authority.public_key()) != roster.authority:
        message = f"{folder / AUTHORITY} is not the authority that the roster names; restore it from a copy"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, AUTHORITY)
    return Cluster(folder, first, data, root, roster, authority)


def check_unchanged(cluster: Cluster) -> None:
    """That no change waits: two documents of one version would split the cluster into those who saw the one and those
    who saw the other."""
    if cluster.pending.exists():
        message = f"a change is pending in {cluster.pending}; adopt it once it is signed, or delete it if nobody signs"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder")


def propose(cluster: Cluster, data: bytes) -> None:
    """The roster `data` is in force where enough holders have signed it and the root in front of it, else it waits."""
    try:
        put_in_force(cluster, data)
    except ResplitError as error:
        if error.code is not ErrorCode.BAD_SIGNATURE:
            raise
        write_durably(cluster.pending, data, PUBLIC)


def put_in_force(cluster: Cluster, data: bytes) -> Roster:
    """Keep the roster `data`, and the logins that go with it; errors are those of `root_of` and `open_roster`."""
    roster = open_roster(root_of(cluster.root, data), data)
    write_durably(cluster.folder / ROSTER, data, PUBLIC)
    write_logins(cluster.folder, roster)
    return roster


def write_logins(folder: Path, roster: Roster) -> None:
    """Write anew who may log in at the NATS server, and at each where there are several (`bus.servers`)."""
    logins, servers = logins_of(roster), sorted(path for path in (folder / SERVERS).glob("*") if path.is_dir())
    leaves = {there: read_public(there / LEAF_LOGIN).decode() for there in servers if (there / LEAF_LOGIN).exists()}
    whole = logins_conf(logins, [LeafLogin(there.name, nkey) for there, nkey in leaves.items()]).encode()
    write_durably(folder / LOGINS_FILE, whole, PUBLIC)
    for there in servers:
        write_durably(there / LOGINS_FILE, _logins_at(there, logins) if there in leaves else whole, PUBLIC)


def _logins_at(leaf: Path, logins: Sequence[Login]) -> bytes:
    conf = logins_conf(logins, home=SiteId(leaf.name)) if (leaf / HOME).exists() else leaf_logins_conf(logins)
    return conf.encode()


def signers_of(root: RootKeys, roots: Sequence[Holder], *more: RootKeys) -> Signers:
    """The holders' keys by id; each is one of `root`, or of `more`, and there is at least one."""
    keys = {key_id(holder.signing.public_key()): holder.signing for holder in roots}
    strangers = sorted(set(keys).difference(root.keys, *(other.keys for other in more)))
    if strangers or not keys:
        found = f"key {strangers[0]}" if strangers else "nobody"
        message = f"{found} is not a holder of the root of cluster {root.cluster}; use its `root-N.key`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "roots")
    return keys
