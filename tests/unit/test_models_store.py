"""The content-addressed store: whole blobs or none, each once, and none lost to a neighbour."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from models.store import Store
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest, ModelKind
from tests.model_split import corrupt


def manifest(name: str, graph: BlobRef, *weights: BlobRef) -> Manifest:
    block = Block(index=0, role="whole", graph=graph, weights=weights, flops_per_token=1)
    return Manifest(
        name=name,
        kind=ModelKind.TENSOR,
        architecture="test",
        precision="fp32",
        source="test",
        cut="Not cut: a test.",
        inputs=(),
        outputs=(),
        blocks=(block,),
        whole=graph,
    )


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_equal_bytes_are_stored_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    assert store.put(b"weights") == store.put_file(tmp_path / "file") == store.put(b"weights")
    assert [path.name for path in store.blobs_folder.iterdir()] == [digest_of(b"weights")]


def test_room_is_made_of_what_nothing_needs_the_oldest_first(store: Store) -> None:
    graph, weight = store.put(b"graph"), store.put(b"weight")
    store.name("named", store.save_manifest(manifest("named", graph, weight)))
    kept, oldest, older, newest = (store.put(data) for data in (b"kept", b"oldest", b"older", b"newest"))
    for age, blob in enumerate((newest, older, oldest, kept)):
        os.utime(store.path(blob.digest), (1_000_000 - age, 1_000_000 - age))
    assert store.make_room(oldest.size_bytes + 1, {kept.digest}) == (oldest.digest, older.digest)
    assert [store.has(blob.digest) for blob in (kept, newest, graph, weight)] == [True] * 4
    assert store.make_room(1 << 40, {kept.digest}) == (newest.digest,), "all that nothing needs, and no more"
    store.verify_model("named")


def test_no_room_is_made_while_an_import_runs(store: Store) -> None:
    blob = store.put(b"has no name yet")
    with store.importing(), pytest.raises(ResplitError) as caught:
        Store(store.root).make_room(1, ())
    assert caught.value.code is ErrorCode.OVERLOADED
    assert store.has(blob.digest)


def test_nothing_temporary_is_left_behind(store: Store) -> None:
    store.put(b"one")
    with store.receive(digest_of(b"two"), 3):
        pass
    with store.receive(digest_of(b"two"), 3) as receiver:
        receiver.write(0, b"two")
        receiver.commit()
    assert list((store.root / "partial").iterdir()) == []


def test_a_download_that_was_interrupted_goes_on_where_it_was(store: Store) -> None:
    with store.receive(digest_of(b"good"), 4) as receiver:
        receiver.write(2, b"od")
    assert not store.has(digest_of(b"good"))
    with store.receive(digest_of(b"good"), 4) as receiver:
        assert [receiver.has(*piece) for piece in ((2, 2), (0, 2), (2, 1), (0, 4))] == [True, False, False, False]
        receiver.write(0, b"go")
        receiver.commit()
    assert store.read(digest_of(b"good")) == b"good"
    assert list((store.root / "partial").iterdir()) == []


def test_a_download_goes_on_after_its_process_was_killed(store: Store) -> None:
    killed = f"""
import os, signal
from pathlib import Path
from models.store import Store
receiver = Store(Path({str(store.root)!r})).receive({digest_of(b"good")!r}, 4)
receiver.write(0, b"go")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    with store.receive(digest_of(b"good"), 4) as receiver:
        assert receiver.has(0, 2)
        receiver.write(2, b"od")
        receiver.commit()
    store.verify(digest_of(b"good"))


def test_what_a_sudden_end_made_of_a_download_is_found_and_not_kept(store: Store) -> None:
    """Noted, but not what was sent; noted, but gone; half a note."""
    partial = store.root / "partial" / digest_of(b"good")
    with store.receive(digest_of(b"good"), 4) as receiver:
        receiver.write(0, b"evil")
    with store.receive(digest_of(b"good"), 4) as receiver, pytest.raises(ResplitError):
        assert receiver.has(0, 4)
        receiver.commit()
    assert list(partial.parent.iterdir()) == []
    for harm in (lambda: partial.write_bytes(b"g"), partial.unlink):
        with store.receive(digest_of(b"good"), 4) as receiver:
            receiver.write(0, b"good")
        harm()
        with store.receive(digest_of(b"good"), 4) as receiver:
            assert not receiver.has(0, 4)
    with store.receive(digest_of(b"good"), 4) as receiver:
        receiver.write(0, b"go")
        receiver.write(2, b"od")
    notes = partial.with_name(f"{partial.name}.pieces")
    notes.write_bytes(notes.read_bytes()[:-1])
    with store.receive(digest_of(b"good"), 4) as receiver:
        assert (receiver.has(0, 2), receiver.has(2, 2)) == (True, False)
        receiver.write(2, b"od")
        receiver.commit()


def test_two_downloads_of_one_blob_do_not_meet(store: Store) -> None:
    with store.receive(digest_of(b"good"), 4) as one, store.receive(digest_of(b"good"), 4) as other:
        one.write(0, b"go")
        assert not other.has(0, 2)
        other.write(0, b"evil")
        one.write(2, b"od")
        one.commit()
        with pytest.raises(ResplitError, match="hashes to"):
            other.commit()
    store.verify(digest_of(b"good"))
    assert list((store.root / "partial").iterdir()) == []


def test_a_full_disk_is_not_kept_full(store: Store) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with store.receive(digest_of(b"large"), 1 << 20) as receiver:
            receiver.write(0, b"begun")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                receiver.write(5, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((store.root / "partial").iterdir()) == []


def test_pieces_may_arrive_in_any_order(store: Store) -> None:
    data = bytes(range(200)) * 50
    with store.receive(digest_of(data), len(data)) as receiver:
        receiver.write(5000, data[5000:])
        receiver.write(0, data[:5000])
        assert not store.has(digest_of(data))
        assert receiver.commit() == BlobRef(digest=digest_of(data), size_bytes=len(data))
    assert store.read(digest_of(data)) == data


def test_a_download_with_other_bytes_is_deleted(store: Store) -> None:
    receiver = store.receive(digest_of(b"good"), 4)
    receiver.write(0, b"evil")
    with pytest.raises(ResplitError, match="hashes to") as caught:
        receiver.commit()
    assert caught.value.code is ErrorCode.CORRUPT_FILE
    assert not store.has(digest_of(b"good"))
    assert list((store.root / "partial").iterdir()) == []


def test_a_truncated_download_is_deleted(store: Store) -> None:
    receiver = store.receive(digest_of(b"good"), 4)
    receiver.write(0, b"goo")
    with pytest.raises(ResplitError, match="fetch it from another peer"):
        receiver.commit()


def test_a_piece_outside_the_announced_size_is_refused(store: Store) -> None:
    with store.receive(digest_of(b"good"), 4) as receiver, pytest.raises(ResplitError, match="byte 5 of 4"):
        receiver.write(1, b"good")


def test_a_corrupt_blob_is_named(store: Store) -> None:
    ref = store.put(b"weights")
    corrupt(store.path(ref.digest))
    for check in (store.verify, store.read):
        with pytest.raises(ResplitError, match=ref.digest) as caught:
            check(ref.digest)
        assert caught.value.code is ErrorCode.CORRUPT_FILE


def test_a_missing_blob_is_named(store: Store) -> None:
    with pytest.raises(ResplitError, match=digest_of(b"x")) as caught:
        store.verify(digest_of(b"x"))
    assert caught.value.code is ErrorCode.MISSING_BLOB


@pytest.mark.parametrize("bad", ["../../etc/passwd", "abc", "A" * 64, ""])
def test_what_is_no_digest_reaches_no_file(store: Store, bad: str) -> None:
    with pytest.raises(ResplitError) as caught:
        store.path(Digest(bad))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("bad", ["../evil", "", "a/b", ".hidden", "x" * 129])
def test_what_is_no_name_names_nothing(store: Store, bad: str) -> None:
    with pytest.raises(ResplitError) as caught:
        store.name(bad, digest_of(b""))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_an_unknown_model_is_answered_with_the_known_ones(store: Store) -> None:
    digest = store.save_manifest(manifest("one", store.put(b"graph")))
    store.name("one", digest)
    assert store.resolve("one") == store.resolve(digest) == digest
    with pytest.raises(ResplitError, match="known: one") as caught:
        store.resolve("two")
    assert caught.value.code is ErrorCode.UNKNOWN_MODEL


def test_a_manifest_comes_back_as_it_was(store: Store) -> None:
    given = manifest("one", store.put(b"graph"), store.put(b"weight"))
    store.name("one", store.save_manifest(given))
    assert store.manifest("one") == given


def test_verifying_a_model_looks_at_every_file_and_says_how_far_it_is(store: Store) -> None:
    weight = store.put(b"weight")
    store.name("one", store.save_manifest(manifest("one", store.put(b"graph"), weight)))
    told: list[tuple[str, int, int]] = []
    store.verify_model("one", lambda *step: told.append(step))
    assert told[-1] == ("verify", 11, 11)
    corrupt(store.path(weight.digest))
    with pytest.raises(ResplitError, match=weight.digest):
        store.verify_model("one")


def test_removing_a_model_frees_only_what_no_other_uses(store: Store) -> None:
    shared, own = store.put(b"shared weight"), store.put(b"own")
    store.name("one", store.save_manifest(manifest("one", store.put(b"graph one"), shared, own)))
    store.name("two", store.save_manifest(manifest("two", store.put(b"graph two"), shared)))
    size = store.path(store.resolve("one")).stat().st_size
    assert store.remove("one") == size + len(b"own") + len(b"graph one")
    assert store.names().keys() == {"two"}
    store.verify_model("two")
    assert not store.has(own.digest)


def test_two_names_of_one_model_keep_it_until_both_are_gone(store: Store) -> None:
    digest = store.save_manifest(manifest("one", store.put(b"graph")))
    store.name("one", digest)
    store.name("alias", digest)
    assert store.remove("one") == 0
    store.verify_model("alias")


def test_nothing_is_removed_while_an_import_runs(store: Store) -> None:
    store.name("one", store.save_manifest(manifest("one", store.put(b"graph"))))
    with store.importing(), pytest.raises(ResplitError, match="try again") as caught:
        store.remove("one")
    assert caught.value.code is ErrorCode.OVERLOADED
    assert store.remove("one") > 0


def test_many_writers_of_one_blob_leave_one_whole_blob(tmp_path: Path) -> None:
    data = b"x" * 300_000
    stores = [Store(tmp_path / "store") for _ in range(8)]
    threads = [threading.Thread(target=store.put, args=(data,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[0].verify(digest_of(data))
    assert list((tmp_path / "store" / "partial").iterdir()) == []


def test_what_a_crash_left_unfinished_is_swept_away_after_a_day(store: Store) -> None:
    (store.root / "partial" / "left").write_bytes(b"half of a blob")
    written = (store.root / "partial" / "left").stat().st_mtime
    assert store.sweep(written + 3600) == 0
    assert store.sweep(written + 2 * 86_400) == len(b"half of a blob")
    assert list((store.root / "partial").iterdir()) == []
