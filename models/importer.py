"""Import a model: from a Hugging Face folder or hub name, a builder's output folder, any ONNX file, or a pipeline.

source                                         becomes
folder/ with config.json, *.safetensors        a decoder or an embedder, exported here
hf:owner/name                                  the same, downloaded first
folder/ with model.onnx (genai_config.json)    what the graph and the files beside it say
file.onnx                                      the same
file.toml                                      a pipeline of models that the store has (`models.pipelines`)
adder                                          the small decoder that comes with Resplit, which adds numbers
"""

import re
import tempfile
from pathlib import Path

from models import hugging_face
from models.assemble import Origin, Progress, assemble
from models.hugging_face import Precision
from models.pipelines import SUFFIX, import_pipeline
from models.store import Store
from models.text_files import has_tokenizer, read_json
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError

NAME_LENGTH = 64
SHIPPED = "adder"


def import_model(
    source: str,
    store: Store,
    name: str | None = None,
    precision: Precision = "fp32",
    progress: Progress = lambda stage, done, total: None,
    provider: str = "cpu",
) -> tuple[str, Digest]:
    """Bring a model into the store as blocks and name it; returns the name and its manifest's digest.

    `precision` and `provider` ("cpu" or "cuda", what the graph is built for) apply to decoders exported
    here; an encoder is exported in fp32 and a graph that exists is taken as it is. Progress is told as
    (stage, done, total) with the stages download, export, read, weights, cut and done. Until the name is
    given, nothing of an import that failed is visible.
    """
    if (described := Path(source).expanduser()).suffix == SUFFIX:
        imported = import_pipeline(described, store, name or name_of(described.stem))
        progress("done", 1, 1)
        return imported
    if source == SHIPPED and not Path(source).exists():
        return _import_shipped(store, name or SHIPPED)
    with store.importing(), tempfile.TemporaryDirectory(prefix="resplit-import-") as scratch:
        path, origin = _locate(source, name, precision, provider, Path(scratch), progress)
        manifest = assemble(path, origin, store, progress)
        digest = store.save_manifest(manifest)
        store.name(manifest.name, digest)
    progress("done", 1, 1)
    return manifest.name, digest


def _import_shipped(store: Store, name: str) -> tuple[str, Digest]:
    shipped = Store(Path(__file__).parent / SHIPPED / "store")
    with store.importing():
        for blob in sorted(shipped.blobs_folder.iterdir()):
            store.put_file(blob)
        digest = shipped.resolve(SHIPPED)
        store.name(name, digest)
    return name, digest


def _locate(
    source: str, name: str | None, precision: Precision, provider: str, scratch: Path, progress: Progress
) -> tuple[Path, Origin]:
    """The ONNX file to import, made first where the source is none, and where it comes from."""
    if source.startswith(hugging_face.HUB_PREFIX):
        progress("download", 0, 1)
        folder = hugging_face.download(source)
        progress("download", 1, 1)
        return _from_folder(
            folder, source, name or name_of(source.rsplit("/", maxsplit=1)[-1]), precision, provider, scratch, progress
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(
            path, path.name, name or name_of(path.resolve().name), precision, provider, scratch, progress
        )
    if not path.is_file():
        raise ResplitError(
            ErrorCode.INVALID_REQUEST,
            f"{source!r} does not exist; give a .onnx file, a model folder or hf:owner/name",
            "source",
        )
    return path, _onnx_origin(path, name or name_of(path.stem))


def _from_folder(
    folder: Path, source: str, name: str, precision: Precision, provider: str, scratch: Path, progress: Progress
) -> tuple[Path, Origin]:
    genai = read_json(folder / "genai_config.json")
    if genai:
        file = genai.get("model", {}).get("decoder", {}).get("filename", "model.onnx")
        return folder / str(file), _onnx_origin(folder / str(file), name)
    config = read_json(folder / "config.json")
    if not config or not any(folder.glob("*.safetensors")):
        graphs = sorted(folder.glob("*.onnx"))
        if len(graphs) == 1:
            return graphs[0], _onnx_origin(graphs[0], name)
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"{folder} holds neither config.json with *.safetensors nor genai_config.json nor exactly one .onnx file",
            "source",
        )
    architecture = hugging_face.architecture_of(config)
    progress("export", 0, 1)
    if hugging_face.is_decoder_folder(config):
        path, maker = hugging_face.export_decoder(folder, scratch, precision, provider)
    elif has_tokenizer(folder):
        path, maker = hugging_face.export_encoder(folder, scratch)
    else:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"{architecture} is no causal decoder and {folder.name} has no tokenizer.json; export it to ONNX first",
            "source",
        )
    progress("export", 1, 1)
    return path, Origin(name, f"{maker}: {source}", architecture, folder)


def _onnx_origin(path: Path, name: str) -> Origin:
    folder = path.parent
    if not has_tokenizer(folder) and folder.name == "onnx" and has_tokenizer(folder.parent):
        # The hub keeps exported graphs in a folder of their own, below the tokenizer.
        folder = folder.parent
    config = read_json(folder / "config.json")
    kind = read_json(folder / "genai_config.json").get("model", {}).get("type")
    architecture = hugging_face.architecture_of(config) if config else str(kind or "onnx")
    return Origin(name, f"ONNX file: {path.name}", architecture, folder)


def name_of(text: str) -> str:
    """A model name made of a file's or folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._").lower()[:NAME_LENGTH] or "model"
