"""Sessions of ONNX Runtime, opened only on bytes whose hashes were checked."""

import functools
from pathlib import Path

import onnxruntime as ort

from models.providers import EXECUTION_PROVIDERS, Provider, require, unavailable
from models.store import Store, missing
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest

ERRORS_ONLY = 3
# Threads that spin for work between two tokens steal the cores of every other session on the machine:
# two processes with spinning pools took 27 ms a token where 13 are possible. So a pool spins only as
# long as operators of one call follow each other, and stops when the call returns.
SPIN_US = 200

# What was verified in this process, so that one who looks twice in a moment hashes once. A file that was written to has
# another inode, time or size and is hashed again.
Stamp = tuple[Digest, int, int, int]
_verified: set[Stamp] = set()


def open_session(graph: bytes, blobs_folder: Path, provider: Provider, threads: int) -> ort.InferenceSession:
    """A session over a stored graph whose weights are in `blobs_folder`, with its own thread pool.

    It runs on `provider` or not at all: raises PROVIDER_UNAVAILABLE where the provider is not there and
    UNSUPPORTED_MODEL where it has no kernel for the graph. The bytes must have been verified (`verified_graph`).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(blobs_folder))
    wanted = require(provider)
    if provider == "cpu":
        _share_work_buffers()
        options.add_session_config_entry("session.use_env_allocators", "1")
    providers = [wanted] if provider == "cpu" else [wanted, EXECUTION_PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:
        # ONNX Runtime's errors share no public base class; all mean that this graph cannot be loaded.
        message = f"ONNX Runtime cannot load the graph on {provider}: {_first_line(error)}"
        raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message) from error
    session.disable_fallback()
    if wanted not in session.get_providers():
        raise unavailable(provider, "it opened no session")
    return session


@functools.cache
def _share_work_buffers() -> None:
    """One arena for the activations of all sessions of this process, as only one of them runs at a time. With one each,
    a node that hosts many blocks holds as many work buffers: 0.3 MB a block on a model of 0.8 MB a block."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)


def verified_graph(store: Store, block: Block) -> bytes:
    """The graph of a block, after the hashes of it, of all its weights and of its adapter were found right.

    Raises MISSING_BLOB or CORRUPT_FILE before any byte reaches ONNX Runtime.
    """
    for ref in block.files:
        if ref != block.graph:
            verify_once(store, ref)
    return store.read(block.graph.digest)


def verified_whole(store: Store, manifest: Manifest) -> bytes:
    """The uncut graph of a model, after the hashes of it and of every weight were found right.

    Raises UNSUPPORTED_MODEL for a sealed model, with which it is not kept.
    """
    if manifest.is_sealed:
        message = f"{manifest.name} is sealed, and the uncut graph is not kept; import the model in the open elsewhere"
        raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "model")
    for block in manifest.blocks:
        for weight in block.weights:
            verify_once(store, weight)
    return store.read(manifest.whole.digest)


def verify_once(store: Store, ref: BlobRef) -> None:
    """`Store.verify`, skipped for a file that this process already verified and that has not changed since."""
    if stamp_of(store, ref) not in _verified:
        verify_again(store, ref)


def verify_again(store: Store, ref: BlobRef) -> None:
    """`Store.verify`, whatever was verified before: a disk that rots leaves a file's times as they were."""
    stamp = stamp_of(store, ref)
    _verified.discard(stamp)
    store.verify(ref.digest)
    note_verified(stamp)


def note_verified(stamp: Stamp) -> None:
    """The file was found whole since the stamp was taken, by whatever means."""
    _verified.add(stamp)


def stamp_of(store: Store, ref: BlobRef) -> Stamp:
    """A file as it is now. Raises MISSING_BLOB, and CORRUPT_FILE for one of another size."""
    path = store.path(ref.digest)
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise missing(ref.digest) from error
    if found.st_size != ref.size_bytes:
        raise ResplitError(
            ErrorCode.CORRUPT_FILE,
            f"blob {ref.digest} has {found.st_size} bytes instead of {ref.size_bytes}; fetch it again",
        )
    return ref.digest, found.st_ino, found.st_mtime_ns, found.st_size


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
