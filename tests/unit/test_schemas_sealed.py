"""A sealed manifest names each file and each host of a block once, and no key opens two blocks."""

import pytest
from pydantic import ValidationError

from schemas.base import Digest, NodeId
from schemas.codec import decode, encode
from schemas.manifest import BlobRef
from schemas.sealed import SealedBlock, SealedFile, SealedManifest, Wrap

A, B = NodeId("a"), NodeId("b")


def file(plain: str, sealed: str) -> SealedFile:
    return SealedFile(
        plain=BlobRef(digest=Digest(plain * 64), size_bytes=100),
        sealed=BlobRef(digest=Digest(sealed * 64), size_bytes=136),
    )


def block(index: int, *files: SealedFile, epoch: int = 1) -> SealedBlock:
    return SealedBlock(
        index=index, epoch=epoch, files=files, wraps=(Wrap.of(A, bytes(80)), Wrap.of(B, bytes(range(80))))
    )


MANIFEST = SealedManifest(
    cluster=NodeId("home"),
    model=Digest("a" * 64),
    revision=1,
    blocks=(block(0, file("1", "2"), file("3", "4")), block(1, file("1", "5"))),
)


def test_it_comes_back_from_its_canonical_bytes() -> None:
    assert decode(SealedManifest, encode(MANIFEST), "sealed manifest") == MANIFEST


def test_a_wrap_gives_back_its_bytes_and_only_hosts_have_one() -> None:
    found = MANIFEST.blocks[0].wrap_for(B)
    assert found is not None
    assert found.data == bytes(range(80))
    assert MANIFEST.blocks[0].wrap_for(NodeId("c")) is None


def test_a_file_of_two_blocks_is_sealed_once_for_each() -> None:
    with pytest.raises(ValidationError, match="named twice"):
        SealedManifest(
            cluster=NodeId("home"),
            model=Digest("a" * 64),
            revision=1,
            blocks=(block(0, file("1", "2")), block(1, file("1", "2"))),
        )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"blocks": (block(1, file("1", "2")),)}, "carries index 1"),
        ({"blocks": ()}, "at least 1"),
        ({"revision": 0}, "greater than or equal to 1"),
        ({"cluster": "a|b"}, "pattern"),
        ({"signature": "x"}, "not permitted"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changed: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SealedManifest.model_validate({**MANIFEST.model_dump(), **changed})


def test_a_block_names_each_file_and_each_host_once() -> None:
    with pytest.raises(ValidationError, match="twice"):
        block(0, file("1", "2"), file("1", "3"))
    with pytest.raises(ValidationError, match="two keys for node a"):
        SealedBlock(index=0, epoch=1, files=(file("1", "2"),), wraps=(Wrap.of(A, bytes(80)), Wrap.of(A, bytes(80))))


def test_a_file_in_the_open_does_not_pass_as_sealed() -> None:
    plain = BlobRef(digest=Digest("1" * 64), size_bytes=100)
    for other in (plain, BlobRef(digest=Digest("2" * 64), size_bytes=100)):
        with pytest.raises(ValidationError, match="not sealed"):
            SealedFile(plain=plain, sealed=other)


@pytest.mark.parametrize("size", [0, 79, 81])
def test_a_wrap_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValidationError):
        Wrap.of(A, bytes(size))


def test_a_wrap_has_one_spelling() -> None:
    spelled = Wrap.of(A, bytes(80)).wrapped
    with pytest.raises(ValidationError):
        Wrap(node=A, wrapped=spelled[:-2] + "B=")
