"""Caches that another node gives count where it was asked for them."""

from dataclasses import replace

import numpy as np
import pytest

from agent.handover import Handover
from agent.kv import KvPool
from agent.sequences import Records
from schemas.base import Digest, NodeId
from schemas.frame import Adopt, Adopted, Cache, Fetch, Frame, Move, Sampling
from schemas.manifest import BlobRef, Block, KvCache

ME, SOURCE, OTHER, INGRESS = NodeId("me"), NodeId("source"), NodeId("other"), NodeId("ingress")
TOKENS, HEADS, DIM, SEQUENCE = 16, 2, 4, 7
BLOB = BlobRef(digest=Digest("0" * 64), size_bytes=1)
LAYER = KvCache(
    layout="shared", past_key="a", past_value="b", present_key="c", present_value="d",
    dtype="float32", heads=HEADS, head_dim=DIM,
)  # fmt: skip
TAKE = Adopt(
    "chat", 1, 2, 0, INGRESS, SEQUENCE, TOKENS, 64, Sampling(), (Move(1, 1, SOURCE), Move(2, 2, OTHER)), final=True
)


@pytest.fixture
def pool() -> KvPool:
    """Of a node that has blocks 1 and 2 from epoch 2 on."""
    found = KvPool("cpu", ((64, 2),))
    for index in (1, 2):
        found.add_block(Block(index=index, role="layer", graph=BLOB, weights=(), kv=(LAYER,), flops_per_token=1))
    return found


@pytest.fixture
def handover(pool: KvPool) -> Handover:
    records = Records()
    return Handover(ME, pool, records, lambda *_: (0,), lambda *_: frozenset({1, 2}), lambda: 0)


def given(source: NodeId, block: int, value: float = 1.0) -> Cache:
    array = np.full((HEADS, TOKENS, DIM), value, np.float32)
    return Cache("chat", 2, source, SEQUENCE, block, block, 0, TOKENS, {f"{block}.0.k": array, f"{block}.0.v": array})


def frames(outgoing: list[tuple[NodeId, Frame]]) -> list[tuple[NodeId, type[Frame]]]:
    return [(node, type(frame)) for node, frame in outgoing]


def test_a_sequence_is_here_once_each_of_those_who_were_asked_has_given_its_part(handover: Handover) -> None:
    assert frames(handover.adopt(TAKE)) == [(SOURCE, Fetch), (OTHER, Fetch)]
    assert handover.receive(given(SOURCE, 1)) == []
    [(node, answer)] = handover.receive(given(OTHER, 2))
    assert isinstance(answer, Adopted)
    assert (node, answer.error, answer.moved_bytes) == (INGRESS, None, 4 * given(OTHER, 2).tensors["2.0.k"].nbytes)


@pytest.mark.parametrize(
    "false",
    [
        given(OTHER, 1, 9.0),
        given(SOURCE, 2, 9.0),
        given(NodeId("stranger"), 1, 9.0),
        replace(given(SOURCE, 1, 9.0), last=2, tensors=given(SOURCE, 1, 9.0).tensors | given(SOURCE, 2, 9.0).tensors),
    ],
)
def test_caches_of_somebody_else_are_as_if_they_had_not_come(pool: KvPool, handover: Handover, false: Cache) -> None:
    handover.adopt(TAKE)
    assert handover.receive(false) == []
    assert handover.receive(given(SOURCE, 1)) == []
    assert frames(handover.receive(given(OTHER, 2))) == [(INGRESS, Adopted)]
    for block in (1, 2):
        assert all((array == 1.0).all() for array in pool.read(block, SEQUENCE, 0, TOKENS))
