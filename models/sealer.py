"""A model in the open becomes a sealed one: its blocks each under a key of its own, the keys beside the store.

What is sealed are the graphs and the weights of all blocks. The manifest and the tokenizer stay as they are: a node
must know of a model what it weighs and how it is cut before it is given any key. The manifest names the digests of the
plaintext, so whoever has the same weights can tell that these are they.
"""

import secrets
import tempfile
from pathlib import Path

from models.assemble import Progress
from models.hugging_face import Precision
from models.importer import import_model
from models.keyring import write_keys
from models.pipelines import SUFFIX
from models.sealing import KEY_BYTES, FileContext, seal_file
from models.store import Store
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest
from schemas.sealed import ModelKeys


def seal_model(
    source: Store, model: str, target: Store, progress: Progress = lambda stage, done, total: None
) -> tuple[str, Digest]:
    """Bring a model of `source` into `target`, sealed under fresh keys; returns its name and its manifest's digest.

    If `target` has the same model in the open, that is deleted there. A model that is sealed already stays as it is,
    so what was interrupted before the plaintext was gone is completed by asking again.

    Raises CORRUPT_FILE for a file of `source` that is damaged, MISSING_BLOB for one that is not there, and OVERLOADED
    while another process changes `target`, INVALID_REQUEST for a pipeline, of which the services are sealed.
    """
    manifest, digest = source.manifest(model), source.resolve(model)
    if manifest.pipeline is not None:
        raise _has_no_weights(manifest.name)
    _check_no_pipeline_uses(target, manifest.unsealed.digest, manifest.name)
    if not manifest.is_sealed:
        with target.importing():
            sealed, keys = _sealed(source, manifest, target, progress)
            write_keys(target, keys)
            digest = target.save_manifest(sealed)
            target.name(manifest.name, digest)
    target.discard(manifest.unsealed.digest)
    progress("done", 1, 1)
    return manifest.name, digest


def import_sealed(
    source: str,
    store: Store,
    name: str | None = None,
    precision: Precision = "fp32",
    progress: Progress = lambda stage, done, total: None,
    provider: str = "cpu",
) -> tuple[str, Digest]:
    """`import_model`, and `store` never sees a byte in the open: that is in a temporary folder of this machine."""
    if source.endswith(SUFFIX):
        raise _has_no_weights(source)
    with tempfile.TemporaryDirectory(prefix="resplit-seal-") as scratch:
        open_store = Store(Path(scratch))
        _, digest = import_model(source, open_store, name, precision, progress, provider)
        return seal_model(open_store, digest, store, progress)


def _sealed(source: Store, manifest: Manifest, target: Store, progress: Progress) -> tuple[Manifest, ModelKeys]:
    if manifest.text is not None:
        target.put_file(source.path(manifest.text.tokenizer.digest))
    keys = [secrets.token_bytes(KEY_BYTES) for _ in manifest.blocks]
    model, blocks, done = manifest.digest, [], 0
    total = sum(block.weight_bytes for block in manifest.blocks)
    for block, key in zip(manifest.blocks, keys, strict=True):
        refs = tuple(_sealed_file(source, ref, target, key, model, block) for ref in block.files)
        blocks.append(block.model_copy(update={"sealed": refs}))
        done += block.weight_bytes
        progress("seal", done, total)
    sealed = Manifest.model_validate({**dict(manifest), "blocks": tuple(blocks)})
    return sealed, ModelKeys.of(sealed.digest, keys)


def _sealed_file(source: Store, ref: BlobRef, target: Store, key: bytes, model: Digest, block: Block) -> BlobRef:
    context = FileContext(model, block.index, ref.digest)
    with source.open(ref.digest) as plain:
        return target.put_written(lambda file: seal_file(plain, file, key, context))


def _check_no_pipeline_uses(store: Store, model: Digest, name: str) -> None:
    """A pipeline names its services' models, and what it names stays in the open."""
    for other, digest in store.names().items():
        try:
            pipeline = store.manifest(digest).pipeline
        except ResplitError:
            continue  # of a manifest that is gone or damaged nothing runs
        if pipeline is not None and any(service.model == model for service in pipeline.services.values()):
            message = f"pipeline {other!r} uses {name!r} in the open; remove it, seal {name!r}, and import it again"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")


def _has_no_weights(pipeline: str) -> ResplitError:
    message = f"{pipeline} is a pipeline, which has no weights; seal its services' models and import it after them"
    return ResplitError(ErrorCode.INVALID_REQUEST, message, "source")
