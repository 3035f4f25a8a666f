"""The content-addressed store: every graph, weight and tokenizer once, by the hash of its bytes.

    root/blobs/<sha256>     the bytes; flat, because ONNX Runtime finds external data by these names
    root/models/<name>      a text file with the digest of the model's manifest, itself a blob
    root/keys/<sha256>      the keys of the sealed model with this manifest, for its owner alone (`models.keyring`)
    root/partial/           writes on their way (`models.partial`)
    root/lock               held shared while importing, exclusively while removing

A blob appears under its name only when all its bytes are on the disk, so a reader never sees half of
one. Two processes that put the same blob write two temporary files and rename to the same name: the
bytes are equal, so whoever comes last changes nothing.
"""

import fcntl
import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from models.partial import Receiver, publish
from schemas import codec
from schemas.base import DIGEST_PATTERN, Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Manifest

COPY_BYTES = 1 << 20
# No download that is still alive goes this long without a piece.
ABANDONED_SECONDS = 86_400
MODEL_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


class Store:
    """A folder of blobs and of the names of the models made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models = root / "models"
        self._partial = root / "partial"
        for folder in (self.blobs_folder, self._models, self._partial):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def blobs_folder(self) -> Path:
        """The folder ONNX Runtime resolves external data against."""
        return self.root / "blobs"

    @property
    def keys_folder(self) -> Path:
        """Where the keys of sealed models are, if this store has any: never among the blobs, which are served."""
        return self.root / "keys"

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be. Raises INVALID_REQUEST for what is no SHA-256."""
        if not re.fullmatch(DIGEST_PATTERN, digest):
            raise ResplitError(
                ErrorCode.INVALID_REQUEST, f"{digest!r} is not a SHA-256 in lower-case hexadecimal", "digest"
            )
        return self.blobs_folder / digest

    def has(self, digest: Digest) -> bool:
        """Whether the blob is here; its bytes are not looked at (see `verify`)."""
        return self.path(digest).is_file()

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Store these bytes once; a blob that is already here is left as it is."""
        ref = BlobRef(digest=Digest(hashlib.sha256(data).hexdigest()), size_bytes=len(data))
        path = self.path(ref.digest)
        if not (path.is_file() and path.stat().st_size == ref.size_bytes):
            with self._new_file() as (file, temporary):
                file.write(data)
                publish(file, temporary, path)
        return ref

    def put_file(self, path: Path) -> BlobRef:
        """Store the bytes of a file, read in pieces and hashed as they are copied."""
        hasher = hashlib.sha256()
        with path.open("rb") as source, self._new_file() as (file, temporary):
            while piece := source.read(COPY_BYTES):
                hasher.update(piece)
                file.write(piece)
            ref = BlobRef(digest=Digest(hasher.hexdigest()), size_bytes=file.tell())
            target = self.path(ref.digest)
            if not (target.is_file() and target.stat().st_size == ref.size_bytes):
                publish(file, temporary, target)
        return ref

    def open(self, digest: Digest) -> BufferedReader:
        """The bytes of a blob, not verified. Raises MISSING_BLOB."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError as error:
            raise missing(digest) from error

    def put_written(self, write: Callable[[BinaryIO], BlobRef]) -> BlobRef:
        """Store what `write` writes to the file that it is given; it says which blob that is."""
        with self._new_file() as (file, temporary):
            ref = write(file)
            publish(file, temporary, self.path(ref.digest))
        return ref

    def receive(self, digest: Digest, size_bytes: int) -> Receiver:
        """Begin a download of a blob whose digest and size the manifest gave, or go on with an interrupted one."""
        return Receiver(self.path(digest), size_bytes, self._partial)

    def verify(self, digest: Digest) -> None:
        """Hash the blob. Raises MISSING_BLOB when it is not here and CORRUPT_FILE when its bytes are others."""
        with self.open(digest) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ResplitError(
                ErrorCode.CORRUPT_FILE, f"blob {digest} is corrupt: its bytes hash to {found}; fetch it again"
            )

    def read(self, digest: Digest) -> bytes:
        """The verified bytes of a blob, for small ones: graphs and manifests."""
        with self.open(digest) as file:
            data = file.read()
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise ResplitError(
                ErrorCode.CORRUPT_FILE, f"blob {digest} is corrupt: its bytes hash to {found}; fetch it again"
            )
        return data

    def save_manifest(self, manifest: Manifest) -> Digest:
        """Store the canonical bytes of a manifest and return their digest: the identity of the model."""
        return self.put(codec.encode(manifest)).digest

    def name(self, name: str, digest: Digest) -> None:
        """Let `name` mean the model whose manifest has this digest, from now on and atomically."""
        if not MODEL_NAME.match(name):
            raise ResplitError(
                ErrorCode.INVALID_REQUEST,
                f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-', 128 at most",
                "name",
            )
        with self._new_file() as (file, temporary):
            file.write(digest.encode())
            publish(file, temporary, self._models / name)

    def names(self) -> dict[str, Digest]:
        """Every named model and the digest of its manifest, in alphabetical order."""
        return {path.name: Digest(path.read_text().strip()) for path in sorted(self._models.iterdir())}

    def resolve(self, name_or_digest: str) -> Digest:
        """The digest of a model's manifest. Raises UNKNOWN_MODEL with the names that are known."""
        names = self.names()
        if name_or_digest in names:
            return names[name_or_digest]
        if re.fullmatch(DIGEST_PATTERN, name_or_digest) and self.has(Digest(name_or_digest)):
            return Digest(name_or_digest)
        known = ", ".join(names) or "none yet; import one with `resplit models import`"
        raise ResplitError(ErrorCode.UNKNOWN_MODEL, f"no model {name_or_digest!r} here; known: {known}", "model")

    def manifest(self, name_or_digest: str) -> Manifest:
        """The verified manifest of a model."""
        return codec.decode(Manifest, self.read(self.resolve(name_or_digest)), "manifest")

    def verify_model(self, name_or_digest: str, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Hash every file of a model; the first missing or corrupt one raises. Progress is in bytes."""
        manifest = self.manifest(name_or_digest)
        done = 0
        for digest, size in manifest.blobs.items():
            self.verify(Digest(digest))
            done += size
            if progress is not None:
                progress("verify", done, manifest.stored_bytes)

    def remove(self, name: str) -> int:
        """Forget a name and delete the blobs no other named model uses; returns the bytes freed.

        Raises UNKNOWN_MODEL, and OVERLOADED while an import runs: its blobs have no name yet.
        """
        with self._locked(fcntl.LOCK_EX):
            names = self.names()
            if name not in names:
                self.resolve(name)
                raise ResplitError(ErrorCode.INVALID_REQUEST, f"{name!r} is a digest; remove a model by name", "name")
            model = names.pop(name)
            (self._models / name).unlink()
            return self._delete(model, names)

    def discard(self, model: Digest) -> int:
        """Delete the files of a model that has no name any more and that no named one uses; returns the bytes freed.

        Raises OVERLOADED while an import runs.
        """
        with self._locked(fcntl.LOCK_EX):
            return self._delete(model, self.names())

    def make_room(self, size_bytes: int, keep: Collection[Digest]) -> tuple[Digest, ...]:
        """Delete blobs that are neither in `keep` nor of a named model, the oldest first, until `size_bytes` are free.

        Returns what was deleted. Raises OVERLOADED while an import runs: its blobs have no name yet.
        """
        with self._locked(fcntl.LOCK_EX):
            needed = {digest for named in self.names().values() for digest in self._files(named)} | set(keep)
            idle = [path for path in self.blobs_folder.iterdir() if Digest(path.name) not in needed]
            freed, deleted = 0, []
            for path in sorted(idle, key=lambda path: path.stat().st_mtime):
                if freed >= size_bytes:
                    break
                freed += path.stat().st_size
                path.unlink()
                deleted.append(Digest(path.name))
            return tuple(deleted)

    def sweep(self, now: float) -> int:
        """Delete writes that a crash left unfinished a day or more before `now`; returns the bytes freed."""
        freed = 0
        for path in self._partial.iterdir():
            found = path.stat()
            if now - found.st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
                freed += found.st_size
        return freed

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Hold off `remove` in every process while blobs are stored that no name protects yet."""
        with self._locked(fcntl.LOCK_SH):
            yield

    def _delete(self, model: Digest, names: Mapping[str, Digest]) -> int:
        if model in names.values():
            return 0
        (self.keys_folder / model).unlink(missing_ok=True)
        freed = 0
        idle = self._files(model) - {digest for other in names.values() for digest in self._files(other)}
        # The manifest goes last: while it is there, whoever was interrupted can begin again.
        for digest in sorted(idle, key=lambda digest: digest == model):
            path = self.path(digest)
            if path.is_file():
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _files(self, manifest_digest: Digest) -> set[Digest]:
        """What a model keeps alive: its manifest and, where that is here and whole, every file it names."""
        try:
            manifest = self.manifest(manifest_digest)
        except ResplitError:
            return {manifest_digest}
        services = () if manifest.pipeline is None else manifest.pipeline.services.values()
        of_services = set[Digest]().union(*(self._files(service.model) for service in services))
        return {manifest_digest, *(Digest(digest) for digest in manifest.blobs), *of_services}

    @contextmanager
    def _new_file(self) -> Iterator[tuple[BinaryIO, Path]]:
        temporary = self._partial / secrets.token_hex(16)
        with temporary.open("xb") as file:
            try:
                yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self.root / "lock").open("w") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"another process imports into or removes from {self.root}; try again when it has ended"
                raise ResplitError(ErrorCode.OVERLOADED, message) from error
            yield


def missing(digest: Digest) -> ResplitError:
    """The error for a blob that is not in the store."""
    return ResplitError(ErrorCode.MISSING_BLOB, f"blob {digest} is not in the store; fetch it from a peer that has it")
