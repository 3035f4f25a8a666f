"""A privacy curve: a decoder's blocks run one after another as agents run them, and a probe on what crosses between.

The sessions are those of an agent (`models.session`: verified files, one block a session), on the CPU, and every
sequence is one prefill of one row. One block is loaded at a time, and only the states behind it are kept: memory is
one block's session, the states of all sequences twice (`STATES_BYTES_MAX` at most, each time) and what the probe
needs beside them (`models.inversion`). The embedding table is what the first block answers to each token alone, so
that nothing depends on how a graph stores it.

What this measures is the side of the prompt. On the other side there is nothing to measure: logits *are* the output
token, and from the state before the head they are one product away (`Depth.shows_answer`). And as the attacker knows
the model, it can run all later blocks on what it sees at any depth and have the whole answer, token by token; besides,
every generated token passes through all blocks again as an input, and is recovered as those of the prompt are. Blocks
at the end keep the answer from an untrusted node only as long as it has not got their weights.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from models.excerpts import TOKENS_MIN, Excerpts, Ids, by_rank, from_text
from models.inversion import Sample, Table, candidates, recover
from models.keyring import KeyOf, stored_keys
from models.opening import opened
from models.session import open_session, verify_once
from models.store import Store
from models.text import Text
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Block, Manifest, ModelKind, SharedRole, TensorSpec, TextSpec
from schemas.privacy import Depth, PrivacyCurve

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

STATES_BYTES_MAX = 1 << 30
CANDIDATES_MAX = 16384
"""Tokens that the probe chooses among: the table takes 256 MiB where a model is 4096 wide."""
TABLE_ROWS = 256
"""Tokens whose embeddings one call of the first block computes."""


@dataclass(frozen=True)
class Asked:
    """How many sequences of how many tokens to run, drawn with which seed; from `text` or, without one, by rank."""

    sequences: int
    tokens: int
    seed: int
    text: str | None = None


def measure(store: Store, model: Digest | str, asked: Asked, threads: int, progress: Progress) -> PrivacyCurve:
    """The curve of a decoder of the store. Progress is in sequences run through a block.

    Raises UNKNOWN_MODEL; UNSUPPORTED_MODEL for what is no decoder, has no cut, or has states that numpy cannot hold;
    INVALID_REQUEST for numbers out of range, a text that is too short and sequences that would need too much memory;
    CONTEXT_EXCEEDED; and what opening sessions raises.
    """
    digest = store.resolve(model)
    manifest = store.manifest(digest)
    spec = _decoder(manifest)
    if asked.seed < 0:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"seed is {asked.seed}; give 0 or more", "seed")
    verify_once(store, spec.tokenizer)
    text = Text(spec, store.path(spec.tokenizer.digest))
    # Nearly all prompts begin with what the tokenizer puts first, on which trained models lean; everybody knows it.
    opening = text.encode("")[:1]
    excerpts = _excerpts(asked, text, spec, opening)
    sequences = np.concatenate((excerpts.calibration, excerpts.test))
    _refuse_what_is_too_much(manifest, spec, len(sequences), asked.tokens, len(opening))
    ids = candidates(spec.vocab_size, excerpts.calibration, CANDIDATES_MAX, asked.seed)
    key_of = stored_keys(store, digest)
    table = Table(ids, _embeddings(store, manifest, ids, key_of, threads))
    values: list[Array] = [np.array([[*opening, *row]], np.int64) for row in sequences]
    depths, steps = [], (len(manifest.blocks) - 1) * len(values)
    for block in manifest.blocks[:-1]:
        run = _Runner(store, manifest, block, key_of, threads)
        for i, value in enumerate(values):
            values[i] = run(value)
            progress("probe", block.index * len(values) + i + 1, steps)
        del run
        states = np.concatenate(values)[:, len(opening) :]
        if not np.isfinite(states).all():
            message = f"block {block.index} of {manifest.name} makes values that are not finite; nothing can be probed"
            raise ResplitError(ErrorCode.STAGE_FAILED, message)
        count = len(excerpts.calibration)
        samples = Sample(excerpts.calibration, states[:count]), Sample(excerpts.test, states[count:])
        last = block.index == len(manifest.blocks) - 2 and manifest.blocks[-1].role == "head"
        recovered = recover(*samples, table, asked.seed)
        depths.append(Depth(block=block.index, role=block.role, recovered=recovered, shows_answer=last))
    return PrivacyCurve(
        model=digest,
        drawn="rank" if asked.text is None else "text",
        text=None if asked.text is None else Digest(hashlib.sha256(asked.text.encode()).hexdigest()),
        seed=asked.seed,
        calibration=len(excerpts.calibration),
        test=len(excerpts.test),
        tokens=asked.tokens,
        candidates=ids.size,
        nameable=float(np.isin(excerpts.test, ids).mean()),
        width=_width(manifest),
        depths=tuple(depths),
    )


class _Runner:
    """One block in a session of its own: whole sequences in, what crosses behind it out."""

    def __init__(self, store: Store, manifest: Manifest, block: Block, key_of: KeyOf, threads: int) -> None:
        assert block.output is not None, "behind the last block nothing crosses"
        self._block = block
        self._given = manifest.inputs[0] if block.input is None else block.input
        self._output = block.output.name
        self._shared = [entry for entry in manifest.shared_inputs if entry.tensor.name in block.shared]
        with opened(store, manifest, [block], key_of) as ([graph], folder):
            self._session: ort.InferenceSession = open_session(graph, folder, "cpu", threads)

    def __call__(self, x: Array) -> Array:
        """[rows, tokens] ids or [rows, tokens, width] states -> states. Raises STAGE_FAILED."""
        rows, tokens = x.shape[:2]
        feeds = {self._given.name: x.astype(self._given.dtype, copy=False)}
        for entry in self._shared:
            value = _control(entry.role, rows, tokens).astype(entry.tensor.dtype)
            feeds[entry.tensor.name] = _as_declared(value, entry.tensor)
        for cache in self._block.kv:
            # Where past and present are one buffer it must hold the call's own tokens as well.
            length = tokens if cache.layout == "shared" else 0
            for name in (cache.past_key, cache.past_value):
                feeds[name] = np.zeros((rows, cache.heads, length, cache.head_dim), cache.dtype)
        try:
            [states] = self._session.run([self._output], feeds)
        except Exception as error:
            # ONNX Runtime's errors share no public base class.
            message = f"block {self._block.index} failed: {type(error).__name__}: {error}"
            raise ResplitError(ErrorCode.STAGE_FAILED, message) from error
        found: Array = states
        return found


def _embeddings(store: Store, manifest: Manifest, ids: Ids, key_of: KeyOf, threads: int) -> Array:
    """What the first block makes of each token where it comes first, [ids, width]."""
    run = _Runner(store, manifest, manifest.blocks[0], key_of, threads)
    parts = [run(ids[start : start + TABLE_ROWS, None])[:, 0] for start in range(0, ids.size, TABLE_ROWS)]
    return np.concatenate(parts)


def _control(role: SharedRole, rows: int, tokens: int) -> Array:
    """The value of a shared input when every row begins with this call."""
    match role:
        case SharedRole.SEQLENS_K:
            return np.full(rows, tokens - 1)
        case SharedRole.TOTAL_SEQUENCE_LENGTH:
            return np.array([tokens])
        case SharedRole.ATTENTION_MASK:
            return np.ones((rows, tokens))
        case SharedRole.POSITION_IDS:
            return np.tile(np.arange(tokens), (rows, 1))
        case SharedRole.PAST_LENGTH:
            return np.array([0])
        case SharedRole.USER:
            raise AssertionError("a decoder has no inputs of the user's besides its tokens")


def _as_declared(value: Array, spec: TensorSpec) -> Array:
    """The same values with the rank that the graph declares: lengths are scalars in one and vectors in another."""
    rank = len(spec.shape)
    if value.ndim == rank:
        return value
    return value.reshape(()) if rank == 0 else value.reshape(-1, *(1,) * (rank - 1))


def _decoder(manifest: Manifest) -> TextSpec:
    """The text settings of a model that can be probed."""
    if manifest.kind is not ModelKind.DECODER or manifest.text is None:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"{manifest.name} is of kind {manifest.kind}; only decoders are probed, as their states are one a token",
            "model",
        )
    if len(manifest.blocks) < 2:
        message = f"{manifest.name} is one block, so that nothing crosses between nodes; {manifest.cut}"
        raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "model")
    kinds = [boundary.dtype for boundary in _boundaries(manifest)]
    kinds += [cache.dtype for block in manifest.blocks for cache in block.kv]
    foreign = next((kind for kind in kinds if kind not in ("float16", "float32", "float64")), None)
    if foreign is not None:
        message = f"{manifest.name} computes in {foreign}, which is not probed on the CPU; import it as fp32 or int4"
        raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "model")
    return manifest.text


def _boundaries(manifest: Manifest) -> list[TensorSpec]:
    return [block.output for block in manifest.blocks if block.output is not None]


def _width(manifest: Manifest) -> int:
    return max(prod(n for n in boundary.shape[2:] if isinstance(n, int)) for boundary in _boundaries(manifest))


def _excerpts(asked: Asked, text: Text, spec: TextSpec, opening: list[int]) -> Excerpts:
    if asked.text is None:
        without = {*spec.eos_token_ids, *opening}
        return by_rank(spec.vocab_size, without, asked.sequences, asked.tokens, asked.seed)
    ids = text.encode(asked.text)
    body = ids[len(opening) :] if ids[: len(opening)] == opening else ids
    return from_text(body, asked.sequences, asked.tokens, asked.seed)


def _refuse_what_is_too_much(manifest: Manifest, spec: TextSpec, sequences: int, tokens: int, opening: int) -> None:
    if tokens + opening > spec.context_length:
        room = spec.context_length - opening
        remedy = f"ask for {room} or fewer" if room >= TOKENS_MIN else "it cannot be probed"
        message = f"{tokens} tokens exceed the context of {manifest.name}, {spec.context_length} tokens; {remedy}"
        raise ResplitError(ErrorCode.CONTEXT_EXCEEDED, message, "tokens")
    needed = sequences * (tokens + opening) * _width(manifest) * np.dtype(np.float32).itemsize
    if needed > STATES_BYTES_MAX:
        most = sequences * STATES_BYTES_MAX // needed
        message = (
            f"the states of {sequences} sequences of {tokens} tokens take {needed} bytes, over {STATES_BYTES_MAX}; "
            f"ask for {most} sequences or fewer, or for shorter ones"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "sequences")
