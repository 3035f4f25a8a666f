"""From an ONNX file to a model in the store: weights out, graph cut, blocks and manifest in."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from onnx import ModelProto

from models.analysis import Analysis, analyse
from models.blocks import CutError, Draft, draft_blocks, shared_inputs, store_blocks
from models.cut import Cut, choose_cut, uncut
from models.graph import dtype_name, read_model
from models.store import Store
from models.text_files import has_tokenizer, read_text_spec
from models.weights import store_weights
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind, TensorSpec, TextSpec

Progress = Callable[[str, int, int], None]
PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class Origin:
    """Where a graph comes from: the facts for the manifest that the graph itself does not tell.

    `text_folder` holds tokenizer.json and the configuration files, where there are any.
    """

    name: str
    source: str
    architecture: str
    text_folder: Path


def assemble(path: Path, origin: Origin, store: Store, progress: Progress) -> Manifest:
    """Cut the ONNX file into blocks and put everything it needs into the store; the manifest is not saved yet.

    Raises CORRUPT_FILE, UNSUPPORTED_MODEL or INVALID_REQUEST, each naming the file or tensor at fault.
    """
    progress("read", 0, 1)
    model = read_model(path)
    progress("read", 1, 1)
    weights = store_weights(model, path.parent, store, lambda done, total: progress("weights", done, total))
    whole = store.put(model.SerializeToString(deterministic=True))
    progress("cut", 0, 1)
    analysis = analyse(model)
    cut, drafts = _cut(analysis)
    blocks = store_blocks(drafts, weights, store)
    progress("cut", 1, 1)
    kind, text = _kind(analysis, origin.text_folder, store)
    interface = analysis.interface
    if kind is ModelKind.DECODER:
        inputs = _specs(analysis, interface.data)
    else:
        inputs = _specs(analysis, tuple(value.name for value in model.graph.input))
    return Manifest(
        name=origin.name,
        kind=kind,
        architecture=origin.architecture,
        precision=precision_of(model),
        source=origin.source,
        cut=cut.sentence,
        inputs=inputs,
        outputs=_specs(analysis, interface.outputs),
        shared_inputs=shared_inputs(analysis, drafts),
        blocks=blocks,
        whole=whole,
        text=text,
    )


def precision_of(model: ModelProto) -> str:
    """The type most of the weights have, as people call it: fp32, fp16, int4, int8."""
    quantised = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if quantised:
        widths = Counter(a.i for node in quantised for a in node.attribute if a.name == "bits")
        return f"int{widths.most_common(1)[0][0]}" if widths else "int4"
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        counts[dtype_name(tensor.data_type)] += prod(tensor.dims)
    most = counts.most_common(1)[0][0] if counts else "float32"
    return PRECISIONS.get(most, most)


def _cut(analysis: Analysis) -> tuple[Cut, list[Draft]]:
    cut = choose_cut(analysis)
    try:
        return cut, draft_blocks(analysis, cut)
    except CutError as error:
        whole = uncut(analysis, f"a block could not stand alone, because {error}")
        try:
            return whole, draft_blocks(analysis, whole)
        except CutError as fault:
            raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, f"the graph cannot be run: {fault}", "source") from fault


def _kind(analysis: Analysis, folder: Path, store: Store) -> tuple[ModelKind, TextSpec | None]:
    if analysis.interface.is_decoder:
        return ModelKind.DECODER, read_text_spec(folder, store, None)
    if has_tokenizer(folder):
        first = analysis.types.get(analysis.interface.outputs[0])
        rank = len(first.shape) if first else 3
        return ModelKind.EMBEDDER, read_text_spec(folder, store, rank)
    return ModelKind.TENSOR, None


def _specs(analysis: Analysis, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    for name in names:
        if name not in analysis.types:
            raise ResplitError(
                ErrorCode.UNSUPPORTED_MODEL,
                f"the file declares no type for {name!r}; save the model with typed inputs and outputs",
                "source",
            )
    return tuple(analysis.types[name].spec(name) for name in names)
