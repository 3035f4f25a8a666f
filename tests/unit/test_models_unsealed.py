"""Weights are in the open in memory alone, for as long as a session is made, and nobody else's are ever removed."""

import hashlib
import io
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from models.sealing import FileContext, seal_file
from models.session import open_session
from models.unsealed import MEMORY, forget_folders, memory_folder, unseal
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError

KEY = bytes(range(32))
WEIGHTS = np.arange(512, dtype=np.float32)
CONTEXT = FileContext(Digest("a" * 64), 0, Digest(hashlib.sha256(WEIGHTS.tobytes()).hexdigest()))


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    target = io.BytesIO()
    seal_file(io.BytesIO(WEIGHTS.tobytes()), target, KEY, CONTEXT, 1024)
    (tmp_path / "sealed").write_bytes(target.getvalue())
    return tmp_path / "sealed"


def adding_graph() -> bytes:
    """y = x + w, with w in a file named by its digest, as in the graph of a block."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[512], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", CONTEXT.file), ("offset", "0"), ("length", "2048")):
        w.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [512]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_a_session_computes_with_weights_that_are_gone_from_memory_s_folder(sealed: Path) -> None:
    if not MEMORY.is_dir():
        pytest.skip("no tmpfs here")
    with memory_folder() as folder:
        unseal(sealed, folder, KEY, CONTEXT)
        session: ort.InferenceSession = open_session(adding_graph(), folder, "cpu", 1)
    assert not folder.exists()
    [found] = session.run(None, {"x": np.ones(512, np.float32)})
    assert np.array_equal(found, WEIGHTS + 1)


def test_the_folder_is_for_this_user_alone_and_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), memory_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_such_a_folder_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ResplitError, match="mount a tmpfs there") as caught, memory_folder(tmp_path / "shm"):
        pass
    assert caught.value.code is ErrorCode.MISSING_DEPENDENCY


def test_a_file_that_two_blocks_share_is_put_there_once(sealed: Path, tmp_path: Path) -> None:
    assert unseal(sealed, tmp_path, KEY, CONTEXT)
    sealed.unlink()
    assert not unseal(sealed, tmp_path, KEY, CONTEXT)
    assert (tmp_path / CONTEXT.file).read_bytes() == WEIGHTS.tobytes()


def test_nothing_of_a_damaged_file_stays(sealed: Path, tmp_path: Path) -> None:
    damaged = bytearray(sealed.read_bytes())
    damaged[-1] ^= 1
    sealed.write_bytes(damaged)
    with pytest.raises(ResplitError) as refused:
        unseal(sealed, tmp_path, KEY, CONTEXT)
    assert refused.value.code is ErrorCode.CORRUPT_FILE
    assert list(tmp_path.iterdir()) == [sealed]


def test_memory_that_is_full_is_said_to_be_and_holds_no_half_of_a_file(sealed: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(ResplitError, match="no room") as refused:
            unseal(sealed, tmp_path, KEY, CONTEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code is ErrorCode.MODEL_TOO_LARGE
    assert list(tmp_path.iterdir()) == [sealed]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    program = f"""
import os, pathlib
from models.unsealed import memory_folder
with memory_folder(pathlib.Path({str(tmp_path)!r})) as folder:
    (folder / "weight").write_bytes(b"x")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    (tmp_path / "resplit-weights-file").write_bytes(b"no folder")
    with memory_folder(tmp_path) as mine:
        assert len(list(tmp_path.glob("resplit-weights-*"))) == 3
        assert forget_folders(tmp_path) == 1
        assert set(tmp_path.iterdir()) == {mine, tmp_path / "resplit-weights-file"}
