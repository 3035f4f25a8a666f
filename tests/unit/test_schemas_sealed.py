"""A sealed model names each sealed file once, no key opens two blocks, and keys have one spelling."""

import hashlib

import pytest
from pydantic import ValidationError

from schemas.base import Digest, NodeId
from schemas.codec import decode, encode
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest
from schemas.sealed import ModelKeys, NodeKeys, Wrap
from tests import trigger_world

MODEL, NODE = Digest("a" * 64), NodeId("a")


def ref(name: str, size: int = 100) -> BlobRef:
    return BlobRef(digest=Digest(hashlib.sha256(name.encode()).hexdigest()), size_bytes=size)


def sealed_block(block: Block, *names: str) -> Block:
    """One graph and one weight, and for each name a sealed file."""
    files = {"graph": ref(f"graph {block.index}"), "weights": (ref("shared weight"),)}
    sealed = tuple(ref(name, 136) for name in names)
    return Block.model_validate({**dict(block), **files, "sealed": sealed})


def model() -> Manifest:
    whole = trigger_world.manifest()
    blocks = tuple(sealed_block(block, f"g {block.index}", f"w {block.index}") for block in whole.blocks)
    return Manifest.model_validate({**dict(whole), "blocks": blocks, "whole": ref("whole")})


def test_a_sealed_manifest_comes_back_and_stores_hold_its_sealed_files_alone() -> None:
    found = model()
    assert decode(Manifest, encode(found), "manifest") == found
    assert found.is_sealed
    plain = {file.digest for block in found.blocks for file in block.files} | {found.whole.digest}
    assert not plain & set(found.blobs)
    assert {file.digest for block in found.blocks for file in block.stored} < set(found.blobs)


def test_the_model_in_the_open_is_another_one_and_has_the_digest_that_it_always_had() -> None:
    found = model()
    assert not found.unsealed.is_sealed
    assert found.unsealed.digest != found.digest
    assert found.unsealed.unsealed == found.unsealed
    assert b"sealed" not in encode(found.unsealed)


def test_a_file_of_two_blocks_is_sealed_once_for_each() -> None:
    whole = model()
    first, second, *rest = whole.blocks
    twice = second.model_copy(update={"sealed": (second.stored[0], first.stored[1])})
    with pytest.raises(ValidationError, match="named twice"):
        Manifest.model_validate({**dict(whole), "blocks": (first, twice, *rest)})


def test_a_model_is_sealed_as_a_whole() -> None:
    whole = model()
    first, *rest = whole.blocks
    with pytest.raises(ValidationError, match="some blocks are sealed and some are not"):
        Manifest.model_validate({**dict(whole), "blocks": (first.model_copy(update={"sealed": None}), *rest)})


@pytest.mark.parametrize(
    ("sealed", "says"),
    [
        ((ref("g", 136),), "2 files and 1 sealed"),
        ((ref("g", 136), ref("w", 100)), "is not sealed"),
        ((ref("g", 136), ref("shared weight", 136)), "is not sealed"),
    ],
)
def test_a_file_in_the_open_does_not_pass_as_sealed(sealed: tuple[BlobRef, ...], says: str) -> None:
    block = sealed_block(model().blocks[0], "g", "w")
    with pytest.raises(ValidationError, match=says):
        Block.model_validate({**dict(block), "sealed": sealed})


def test_a_wrap_gives_back_its_bytes() -> None:
    keys = NodeKeys(model=MODEL, node=NODE, wraps=(Wrap.of(0, bytes(80)), Wrap.of(4, bytes(range(80)))))
    assert [wrap.data for wrap in keys.wraps] == [bytes(80), bytes(range(80))]
    assert decode(NodeKeys, encode(keys), "keys") == keys


@pytest.mark.parametrize("blocks", [(0, 0), (1, 0), ()])
def test_a_node_s_keys_name_each_block_once_in_order(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        NodeKeys(model=MODEL, node=NODE, wraps=tuple(Wrap.of(block, bytes(80)) for block in blocks))


@pytest.mark.parametrize("size", [0, 79, 81])
def test_a_wrap_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValidationError):
        Wrap.of(0, bytes(size))


def test_a_wrap_has_one_spelling() -> None:
    spelled = Wrap.of(0, bytes(80)).wrapped
    with pytest.raises(ValidationError):
        Wrap(block=0, wrapped=spelled[:-2] + "B=")


def test_a_model_s_keys_are_given_block_by_block_and_never_printed() -> None:
    keys = ModelKeys.of(MODEL, [bytes([i]) * 32 for i in range(3)])
    assert [keys.key(i) for i in range(3)] == [bytes([i]) * 32 for i in range(3)]
    assert decode(ModelKeys, encode(keys), "keys") == keys
    assert keys.keys[1] not in repr(keys)
    for block in (-1, 3):
        with pytest.raises(ResplitError) as refused:
            keys.key(block)
        assert refused.value.code is ErrorCode.INVALID_REQUEST
