"""Masks of tokens: what a grammar allows, what the head makes of it, and that they travel."""

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from agent.intake import prepare, takes_long
from agent.sampling import choose, masked
from models.constraint import Constrained, Vocabulary
from models.text import LATELY_MAX, Text
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Sampling
from schemas.manifest import TextSpec
from schemas.request import Constraint, read_request
from tests import model_zoo

SPEC_EOS = 1


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("vocabulary")
    model_zoo.save_tokenizer(folder)
    return Vocabulary(_spec(folder), folder / "tokenizer.json")


def _spec(folder: Path) -> TextSpec:
    from models.store import Store  # noqa: PLC0415

    blob = Store(folder / "store").put_file(folder / "tokenizer.json")
    return TextSpec(
        tokenizer=blob, eos_token_ids=(SPEC_EOS,), vocab_size=model_zoo.VOCAB_SIZE, context_length=64, bos_token="<s>"
    )


def allowed(mask: bytes) -> set[int]:
    return set(
        np.flatnonzero(np.unpackbits(np.frombuffer(zlib.decompress(mask), np.uint8), bitorder="little")).tolist()
    )


def some(found: Constrained, draw: random.Random, count: int) -> list[int]:
    """Tokens that a model might say, drawn among those allowed."""
    said: list[int] = []
    while len(said) < count and (may := allowed(found.after(said)) - {SPEC_EOS}):
        said.append(draw.choice(sorted(may)))
    return said


def test_what_is_said_again_or_otherwise_is_followed(vocabulary: Vocabulary) -> None:
    """Tokens come anew after a loss, fewer or others: the mask is that of a fresh matcher."""
    constraint = Constraint(json_schema={"type": "array", "items": {"type": "integer"}})
    draw = random.Random(3)
    used = vocabulary.constrained(constraint)
    for _ in range(40):
        said = some(vocabulary.constrained(constraint), draw, draw.randrange(1, 12))
        cut = draw.randrange(len(said) + 1)
        assert used.after(said[:cut]) == vocabulary.constrained(constraint).after(said[:cut])
        for index in range(cut, len(said)):
            assert used.follow(index, said[index]) == vocabulary.constrained(constraint).after(said[: index + 1])


def test_a_token_that_is_not_allowed_is_no_secret(vocabulary: Vocabulary) -> None:
    found = vocabulary.constrained(Constraint(regex="abc"))
    wrong = next(iter(set(range(4, 100)) - allowed(found.after([]))))
    with pytest.raises(ResplitError) as error:
        found.follow(0, wrong)
    assert error.value.code is ErrorCode.INTERNAL


def test_a_model_without_the_letters_is_told_so(tmp_path: Path) -> None:
    import models  # noqa: PLC0415
    from models.store import Store  # noqa: PLC0415

    store = Store(Path(models.__path__[0]) / "adder" / "store")
    spec = store.manifest("adder").text
    assert spec is not None
    adder = Vocabulary(spec, store.path(spec.tokenizer.digest))
    assert adder.constrained(Constraint(regex="[0-9]{2}"))
    with pytest.raises(ResplitError) as error:
        adder.constrained(Constraint(json_schema={"type": "object"}))
    assert (error.value.code, error.value.field) == (ErrorCode.INVALID_REQUEST, "constraint")


def test_the_head_chooses_among_what_is_allowed_and_scores_as_ever() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0, -1.0], np.float32)
    mask = zlib.compress(bytes([0b10100]))
    assert choose(logits, Sampling(), 0, mask).token == 2
    drawn = {choose(logits, Sampling(temperature=5.0, seed=seed), 0, mask).token for seed in range(50)}
    assert drawn == {2, 4}
    scored = choose(logits, Sampling(logprobs=2), 0, mask)
    free = choose(logits, Sampling(logprobs=2), 0)
    assert scored.top == free.top
    assert scored.logprob == pytest.approx(1.0 - np.log(np.exp(logits.astype(float)).sum()), abs=1e-6)


@pytest.mark.parametrize(
    "mask", [b"", b"x", zlib.compress(b""), zlib.compress(bytes(4)), zlib.compress(bytes(9) + b"\xff")]
)
def test_a_mask_that_is_none_is_refused(mask: bytes) -> None:
    with pytest.raises(ResplitError):
        masked(np.zeros(17, np.float32), mask)


def test_a_mask_that_unpacks_to_much_takes_no_memory() -> None:
    assert masked(np.zeros(8, np.float32), zlib.compress(b"\xff" * (1 << 26))).shape == (8,)


def test_constraints_are_read_strictly() -> None:
    for wrong in ({}, {"regex": ""}, {"regex": "a", "lark": "b"}, {"json_schema": {"a": "b" * 70000}}, {"xml": "a"}):
        with pytest.raises(ValueError):
            Constraint.model_validate(wrong)
    assert json.loads(Constraint(regex="a").model_dump_json(exclude_none=True)) == {"regex": "a"}


def test_what_takes_long_is_done_ahead_and_remembered(tmp_path: Path) -> None:
    model_zoo.save_tokenizer(tmp_path)
    text = Text(_spec(tmp_path), tmp_path / "tokenizer.json")
    long, short = "the quick brown fox " * 3000, "the quick"
    asked = read_request({"prompt": long})
    assert takes_long(text, asked, len(long))
    assert not takes_long(text, read_request({"prompt": short}), len(short))
    assert not takes_long(text, read_request({"inputs": [_TENSOR]}), 1 << 20), "tensors are not read by a tokenizer"
    prepare(text, asked)
    assert text._lately.keys() == {(long, True)}
    assert text.encode(long) == text._lately[long, True]
    for number in range(20):
        prepare(text, read_request({"input": [f"{number} {long}", short]}))
    assert len(text._lately) == LATELY_MAX, "what is remembered is bounded"
    constrained = read_request({"prompt": short, "constraint": {"regex": "a"}})
    assert takes_long(text, constrained, 10)
    prepare(text, constrained)
    assert not takes_long(text, constrained, 10)


_TENSOR = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}
