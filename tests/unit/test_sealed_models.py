"""A model that is sealed leaves no plaintext in the store, and what is opened with its keys computes the same bits."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner, Result

from models.keyring import has_keys, read_keys, stored_keys
from models.opening import opened
from models.reference import Reference
from models.sealer import seal_model
from models.session import open_session, verify_once
from models.store import Store
from resplit.cli import app
from resplit.demo import shipped_store
from resplit.exits import Exit
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from tests.model_split import corrupt
from tests.plaintext import exposed_in, traces

ADDER = "adder"


@pytest.fixture(scope="module")
def plain() -> Store:
    return Store(shipped_store())


@pytest.fixture
def store(plain: Store, tmp_path: Path) -> Store:
    """With the adder, sealed."""
    store = Store(tmp_path / "store")
    assert seal_model(plain, ADDER, store)[0] == ADDER
    return store


def sealed_in(store: Store) -> tuple[Digest, Manifest]:
    digest = store.resolve(ADDER)
    return digest, store.manifest(digest)


def refused(code: ErrorCode, store: Store, manifest: Manifest, key: bytes, block: int = 1) -> str:
    with pytest.raises(ResplitError) as error, opened(store, manifest, [manifest.blocks[block]], lambda _: key):
        pass
    assert error.value.code is code
    return error.value.message


def test_no_byte_of_a_weight_or_graph_is_in_a_sealed_store(plain: Store, store: Store) -> None:
    wanted = traces(plain, plain.manifest(ADDER).blocks)
    assert len(wanted) > 100
    assert {source for _, source in exposed_in(plain.root, wanted)} == set(wanted.values())
    assert exposed_in(store.root, wanted) == set()
    store.verify_model(ADDER)


def test_opened_blocks_are_the_same_bytes_under_the_same_names(plain: Store, store: Store) -> None:
    digest, manifest = sealed_in(store)
    keys = stored_keys(store, digest)
    with opened(store, manifest, manifest.blocks[:2], keys) as (graphs, folder):
        assert graphs == [plain.read(block.graph.digest) for block in manifest.blocks[:2]]
        for ref in (ref for block in manifest.blocks[:2] for ref in block.files):
            assert (folder / ref.digest).read_bytes() == plain.path(ref.digest).read_bytes()
    assert not folder.exists()


def test_a_block_computes_what_it_computed_in_the_open(plain: Store, store: Store) -> None:
    digest, manifest = sealed_in(store)
    block = manifest.blocks[0]
    found = []
    for place, model in ((plain, manifest.unsealed), (store, manifest)):
        with opened(place, model, [model.blocks[0]], stored_keys(place, digest)) as ([graph], folder):
            session: ort.InferenceSession = open_session(graph, folder, "cpu", 1)
        assert block.output is not None
        [name] = [given.name for given in session.get_inputs()]
        found.append(session.run([block.output.name], {name: np.arange(8)[None]})[0])
    assert np.array_equal(*found)


def test_a_key_opens_one_block_and_no_other(store: Store) -> None:
    digest, manifest = sealed_in(store)
    keys = read_keys(store, digest)
    assert len({keys.key(block.index) for block in manifest.blocks}) == len(manifest.blocks)
    with opened(store, manifest, [manifest.blocks[1]], lambda _: keys.key(1)):
        pass
    assert "does not authenticate" in refused(ErrorCode.CORRUPT_FILE, store, manifest, keys.key(2))


def test_a_damaged_and_a_missing_file_are_not_opened(store: Store) -> None:
    digest, manifest = sealed_in(store)
    keys = read_keys(store, digest)
    path = store.path(manifest.blocks[1].stored[3].digest)
    corrupt(path)
    assert manifest.blocks[1].files[3].digest in refused(ErrorCode.CORRUPT_FILE, store, manifest, keys.key(1))
    path.unlink()
    assert path.name in refused(ErrorCode.MISSING_BLOB, store, manifest, keys.key(1))


def test_a_file_that_opened_is_not_hashed_for_the_next_plan_unless_it_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, manifest = sealed_in(store)
    ref = manifest.blocks[1].stored[3]
    hashed: list[Digest] = []
    monkeypatch.setattr(store, "verify", hashed.append)
    with opened(store, manifest, [manifest.blocks[1]], stored_keys(store, digest)):
        verify_once(store, ref)
    assert hashed == []
    corrupt(store.path(ref.digest))
    verify_once(store, ref)
    assert hashed == [ref.digest]


def test_keys_are_for_their_owner_alone_and_missed_by_name(store: Store) -> None:
    digest, manifest = sealed_in(store)
    path = store.keys_folder / digest
    assert (path.stat().st_mode & 0o777, store.keys_folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [entry.name for entry in store.keys_folder.iterdir()] == [digest]
    whole = path.read_bytes()
    for bad in (b"", whole[:-10], whole.replace(digest.encode(), b"f" * 64)):
        path.write_bytes(bad)
        with pytest.raises(ResplitError, match="bring it again") as caught:
            read_keys(store, digest)
        assert caught.value.code is ErrorCode.CORRUPT_FILE
    path.unlink()
    assert not has_keys(store, digest)
    with pytest.raises(ResplitError, match="bring") as caught:
        stored_keys(store, digest)(0)
    assert caught.value.code is ErrorCode.MISSING_KEYS
    with pytest.raises(ResplitError, match="uncut graph is not kept"):
        Reference(store, ADDER)
    assert manifest.is_sealed


def test_two_sealings_of_one_model_have_nothing_in_common_but_what_they_open_to(plain: Store, tmp_path: Path) -> None:
    stores = [Store(tmp_path / name) for name in ("one", "other")]
    digests = [seal_model(plain, ADDER, store)[1] for store in stores]
    one, other = (store.manifest(ADDER) for store in stores)
    assert digests[0] != digests[1]
    assert one.unsealed == other.unsealed
    sealed = [{ref.digest for block in model.blocks for ref in block.stored} for model in (one, other)]
    assert not sealed[0] & sealed[1]


def run(*arguments: object) -> Result:
    """Run one command; in a thread, because `asyncio.run` takes the loop of the thread it runs in."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(CliRunner().invoke, app, [str(a) for a in arguments]).result()


def test_a_model_is_sealed_where_it_lies_and_the_plaintext_is_gone(plain: Store, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(plain.root, tmp_path / "store")))
    before = store.resolve(ADDER)
    wanted = traces(plain, plain.manifest(ADDER).blocks)
    at = ("--store", store.root)
    digest = json.loads(run("models", "seal", ADDER, "--json", *at).stdout)["digest"]
    assert store.resolve(ADDER) == digest != before
    assert exposed_in(store.root, wanted) == set()
    assert not store.has(before)
    assert run("models", "verify", ADDER, *at).exit_code == Exit.OK
    assert "its keys are here" in run("models", "show", ADDER, *at).stdout
    [listed] = json.loads(run("models", "list", "--json", *at).stdout)["models"]
    assert listed["sealed"] is True
    again = json.loads(run("models", "seal", ADDER, "--json", *at).stdout)["digest"]
    assert again == digest
    assert run("models", "seal", "nobody", *at).exit_code == Exit.NOT_FOUND
    kept = run("models", "remove", ADDER, *at)
    assert kept.exit_code != Exit.OK
    assert "--with-keys" in kept.output
    assert run("models", "verify", ADDER, *at).exit_code == Exit.OK
    assert run("models", "remove", ADDER, "--with-keys", *at).exit_code == Exit.OK
    assert list(store.blobs_folder.iterdir()) == list(store.keys_folder.iterdir()) == []


def test_what_was_interrupted_before_the_plaintext_was_gone_is_completed(plain: Store, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(plain.root, tmp_path / "store")))
    wanted = traces(plain, plain.manifest(ADDER).blocks)
    with pytest.raises(ResplitError) as busy, Store(store.root).importing():
        seal_model(store, ADDER, store)  # sealed and named, but another process holds the store
    assert busy.value.code is ErrorCode.OVERLOADED
    assert store.manifest(ADDER).is_sealed
    assert exposed_in(store.root, wanted)
    seal_model(store, ADDER, store)
    assert exposed_in(store.root, wanted) == set()
    store.verify_model(ADDER)


def test_an_import_that_is_sealed_never_writes_plaintext_into_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weights, "w")])
    opset = [onnx.helper.make_opsetid("", 17)]
    file = tmp_path / "two.onnx"
    file.write_bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    store = tmp_path / "store"
    ended = run("models", "import", file, "--sealed", "--name", "two", "--store", store)
    assert ended.exit_code == Exit.OK, ended.stderr
    assert Store(store).manifest("two").is_sealed
    assert weights.tobytes()[:64] in file.read_bytes()
    assert all(weights.tobytes()[:64] not in path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert os.listdir(tmp_path / "scratch") == []  # noqa: PTH208
