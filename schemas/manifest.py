"""A model as blocks: what the manifest of an imported model says.

A block owns its weights and its KV cache; a stage is a list of blocks. Block 0 is the embedding of a
decoder (and of an encoder), the last one its head. The single tensor that crosses the boundary between
block i and block i+1 is `blocks[i].output` and `blocks[i + 1].input`.
"""

from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256
from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Digest, Sha256, Value
from schemas.codec import encode
from schemas.pipeline import Pipeline

Dimension = int | str
"""A fixed size, or the name of a symbolic one such as `batch`."""


class TensorSpec(Value):
    """A tensor of the graph. `dtype` is numpy's name of it (`float32`, `int64`, ...)."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class ModelKind(StrEnum):
    """How requests drive a model."""

    DECODER = "decoder"
    """Generates text: prefill in chunks, then one token a step, with a KV cache."""
    EMBEDDER = "embedder"
    """Has a tokenizer and no cache: text in, one vector out; also usable as a tensor model."""
    TENSOR = "tensor"
    """Any other graph: tensors in, tensors out."""
    PIPELINE = "pipeline"
    """A graph of services, each a model, conducted by the node that has its one block."""


class SharedRole(StrEnum):
    """What a small graph input that several blocks read means; the agent computes it for every call."""

    SEQLENS_K = "seqlens_k"
    """int32[B]: tokens of each row after this call, minus one (GroupQueryAttention)."""
    TOTAL_SEQUENCE_LENGTH = "total_sequence_length"
    """int32 scalar: the largest number of tokens of any row after this call."""
    ATTENTION_MASK = "attention_mask"
    """int64[B, past + S], all ones."""
    POSITION_IDS = "position_ids"
    """int64[B, S]: absolute positions of this call's tokens."""
    PAST_LENGTH = "past_length"
    """An integer scalar (or shape [1]): tokens of the row before this call."""
    USER = "user"
    """A graph input that the request itself supplies (tensor models and embedders)."""


class SharedInput(Value):
    """A graph input, other than the boundary and the KV cache, that one or more blocks read."""

    tensor: TensorSpec
    role: SharedRole


class KvCache(Value):
    """The cache of one attention layer of one block, by the names its graph gives it.

    `shared`: past and present are one buffer [B, heads, max_len, dim], written in place.
    `concat`: present [B, heads, past + S, dim] is past with the new tokens appended.
    """

    layout: Literal["shared", "concat"]
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dtype: str
    past_key: str
    past_value: str
    present_key: str
    present_value: str

    @property
    def bytes_per_token(self) -> int:
        """Key and value bytes that one token of one sequence occupies."""
        return 2 * self.heads * self.head_dim * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
}


class BlobRef(Value):
    """A file of the content-addressed store: its SHA-256 and its size."""

    digest: Sha256
    size_bytes: int = Field(ge=0)


class Block(Value):
    """One cut unit of the model.

    `graph` is an ONNX protobuf without weights; its external data names each weight's file by digest,
    so that ONNX Runtime finds it in the store's folder. Names are those of the original graph, unique
    over the whole model, so neighbouring blocks merge into one graph by the union of their nodes.
    """

    index: int = Field(ge=0)
    role: Literal["embedding", "layer", "head", "segment", "whole"]
    graph: BlobRef
    weights: tuple[BlobRef, ...]
    input: TensorSpec | None = None
    """The boundary tensor from the block before; None for the first block."""
    output: TensorSpec | None = None
    """The boundary tensor to the next block; None for the last block."""
    shared: tuple[str, ...] = ()
    """Names in `Manifest.shared_inputs` that this block reads."""
    outputs: tuple[str, ...] = ()
    """Names in `Manifest.outputs` that this block produces (the last block, in most models)."""
    kv: tuple[KvCache, ...] = ()
    flops_per_token: int = Field(ge=0)
    """Multiply-adds times two, for one token (or, in a tensor model, one item of batch 1)."""
    adapter: BlobRef | None = None
    """What a variant feeds the graph beside the weights (`models.lora`), safetensors by the names of graph inputs."""
    sealed: tuple[BlobRef, ...] | None = None
    """The sealed form of each of `files`, in their order; None where the model is not sealed."""

    @model_validator(mode="after")
    def _is_sealed_file_by_file(self) -> Self:
        if self.sealed is not None:
            if len(self.sealed) != len(self.files):
                raise ValueError(f"block {self.index} has {len(self.files)} files and {len(self.sealed)} sealed ones")
            for plain, sealed in zip(self.files, self.sealed, strict=True):
                if sealed.size_bytes <= plain.size_bytes or sealed.digest == plain.digest:
                    raise ValueError(f"file {plain.digest} of block {self.index} is not sealed")
        return self

    @property
    def files(self) -> tuple[BlobRef, ...]:
        """Graph, weights and adapter, each file once."""
        own = () if self.adapter is None else (self.adapter,)
        return tuple({ref.digest: ref for ref in (self.graph, *self.weights, *own)}.values())

    @property
    def stored(self) -> tuple[BlobRef, ...]:
        """What lies in stores and travels for this block: its files, or the sealed form of each."""
        return self.files if self.sealed is None else self.sealed

    @property
    def weight_bytes(self) -> int:
        return self.session_bytes + self.adapter_bytes

    @property
    def session_bytes(self) -> int:
        """Of what a session is made of: blocks of one graph, of whatever models, share it."""
        return self.graph.size_bytes + sum(blob.size_bytes for blob in self.weights)

    @property
    def adapter_bytes(self) -> int:
        return 0 if self.adapter is None else self.adapter.size_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(cache.bytes_per_token for cache in self.kv)


class TextSpec(Value):
    """What a model with a tokenizer needs to turn text into ids and back."""

    tokenizer: BlobRef
    """`tokenizer.json` of the `tokenizers` library."""
    chat_template: str | None = None
    """Jinja2 template over `messages`, as Hugging Face tokenizers carry it."""
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = Field(gt=0)
    context_length: int = Field(gt=0)
    pooling: Literal["mean", "cls"] | None = None
    """How an embedder turns token vectors into one; None where the graph does it itself."""
    normalize: bool = False


class Manifest(Value):
    """Everything a node must know of a model before it touches a byte of its weights."""

    version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=128)
    kind: ModelKind
    architecture: str
    precision: str
    source: str
    """The importer that made it and the name of what it read, for people."""
    cut: str
    """One sentence: how the graph was cut, or why it could not be."""
    inputs: tuple[TensorSpec, ...]
    """What a request supplies: a decoder's `input_ids`; a tensor model's graph inputs."""
    outputs: tuple[TensorSpec, ...]
    shared_inputs: tuple[SharedInput, ...] = ()
    blocks: tuple[Block, ...] = Field(min_length=1)
    whole: BlobRef
    """The original graph, uncut and without weights: what every split is measured against. With a sealed model it is
    not kept."""
    text: TextSpec | None = None
    pipeline: Pipeline | None = None

    @model_validator(mode="after")
    def _is_a_pipeline_or_none(self) -> Self:
        if (self.pipeline is not None) != (self.kind is ModelKind.PIPELINE):
            raise ValueError("a pipeline, and nothing else, has a graph of services")
        if self.pipeline is not None and (len(self.blocks) != 1 or self.is_sealed):
            raise ValueError("a pipeline is one block, in the open")
        return self

    @model_validator(mode="after")
    def _blocks_form_a_chain(self) -> Self:
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if block.index != i:
                raise ValueError(f"block {i} carries index {block.index}")
            if (block.input is None) != (i == 0) or (block.output is None) != (i == last):
                raise ValueError(f"block {i} has an open end inside the chain")
            if i and block.input != self.blocks[i - 1].output:
                raise ValueError(f"block {i} does not start where block {i - 1} ends")
        if self.kind is ModelKind.DECODER and self.text is None:
            raise ValueError("a decoder needs a tokenizer")
        return self

    @model_validator(mode="after")
    def _is_sealed_as_a_whole(self) -> Self:
        if len({block.sealed is None for block in self.blocks}) > 1:
            raise ValueError("some blocks are sealed and some are not")
        # One sealed file in two blocks would mean that the key of the one opens a file of the other.
        if twice := _repeated(ref.digest for block in self.blocks for ref in block.sealed or ()):
            raise ValueError(f"sealed file {twice} is named twice")
        return self

    @property
    def is_sealed(self) -> bool:
        """Whether stores hold its blocks sealed, so that it takes their keys to run them."""
        return self.blocks[0].sealed is not None

    @property
    def unsealed(self) -> "Manifest":
        """The manifest of the same model in the open."""
        return self.model_copy(update={"blocks": tuple(b.model_copy(update={"sealed": None}) for b in self.blocks)})

    @property
    def digest(self) -> Digest:
        """The identity of the model. Sealed files are bound to that of `unsealed`, which names none of them."""
        return Digest(sha256(encode(self)).hexdigest())

    @property
    def blobs(self) -> dict[str, int]:
        """Every file of the model in a store, digest -> bytes, each counted once however many blocks share it."""
        found = {ref.digest: ref.size_bytes for block in self.blocks for ref in block.stored}
        if not self.is_sealed:
            found[self.whole.digest] = self.whole.size_bytes
        if self.text is not None:
            found[self.text.tokenizer.digest] = self.text.tokenizer.size_bytes
        return {str(digest): size for digest, size in found.items()}

    @property
    def stored_bytes(self) -> int:
        return sum(self.blobs.values())


def _repeated(digests: Iterable[Digest]) -> Digest | None:
    seen: set[Digest] = set()
    for digest in digests:
        if digest in seen:
            return digest
        seen.add(digest)
    return None
