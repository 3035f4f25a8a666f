"""Real exporters, real sessions: every import, cut everywhere, against the same model uncut."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.importer import import_model
from models.reference import Reference
from models.store import Store
from models.text import Text
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind, SharedRole
from tests import model_zoo
from tests.model_split import SplitDecoder, Stages

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")

CHUNK, CONTEXT, NEW = 32, 128, 12
PROMPT = [int(i) for i in np.random.default_rng(3).integers(4, model_zoo.VOCAB_SIZE, 75)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def every_cut(manifest: Manifest) -> list[list[int]]:
    blocks = len(manifest.blocks)
    return [[], *([i] for i in range(1, blocks)), list(range(1, blocks))]


def assert_every_cut_is_the_whole(store: Store, manifest: Manifest) -> None:
    """Prefill of three chunks and decode steps, bit for bit in the logits, for all cuts in two and the finest."""
    reference = Reference(store, manifest.name, rows=1)
    tokens = reference.generate(PROMPT, NEW, chunk_tokens=CHUNK, context_tokens=CONTEXT, stop_at_eos=False)
    assert len(set(tokens)) > 3 and np.ptp(reference.logits[0]) > 1, "flat logits would prove nothing"
    for cuts in every_cut(manifest):
        split = SplitDecoder(store, manifest, cuts)
        assert split.generate(PROMPT, NEW, chunk_tokens=CHUNK, context_tokens=CONTEXT) == tokens, cuts
        assert all(np.array_equal(a, b) for a, b in zip(split.logits, reference.logits, strict=True)), cuts


@pytest.mark.parametrize(
    ("family", "precision", "tie"),
    [
        ("llama", "int4", False),
        # Cut as these are below and in test_split_equality; only that `import_model` has the builder make them is new.
        pytest.param("llama", "fp32", True, marks=pytest.mark.slow),
        pytest.param("qwen2", "fp32", False, marks=pytest.mark.slow),
        pytest.param("qwen3", "int4", False, marks=pytest.mark.slow),
    ],
)
def test_a_decoder_split_anywhere_is_the_whole_decoder(
    zoo: Path, store: Store, family: str, precision: str, tie: bool
) -> None:
    folder = model_zoo.decoder_folder(zoo, family, tie=tie)
    stages: list[str] = []
    name, digest = import_model(
        str(folder),
        store,
        f"{family}-{precision}",
        precision,  # type: ignore[arg-type]
        lambda stage, done, total: stages.append(stage),
    )
    manifest = store.manifest(name)
    assert store.resolve(name) == digest
    assert list(dict.fromkeys(stages)) == ["export", "read", "weights", "cut", "done"]
    assert manifest.kind is ModelKind.DECODER and manifest.precision == precision
    assert [block.role for block in manifest.blocks] == ["embedding", *["layer"] * model_zoo.LAYERS, "head"]
    assert {shared.role for shared in manifest.shared_inputs} == {
        SharedRole.SEQLENS_K,
        SharedRole.TOTAL_SEQUENCE_LENGTH,
    }
    for block in manifest.blocks[1:-1]:
        assert [(cache.layout, cache.heads, cache.head_dim) for cache in block.kv] == [("shared", 2, 16)]
        assert block.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert manifest.blocks[0].kv == manifest.blocks[-1].kv == ()
    assert manifest.blocks[-1].flops_per_token == 2 * 64 * model_zoo.VOCAB_SIZE
    assert_every_cut_is_the_whole(store, manifest)


def test_a_decoder_whose_head_is_its_embedding_is_the_whole_decoder(zoo: Path, store: Store) -> None:
    name, _ = import_model(str(model_zoo.built_folder(zoo, "llama", "fp32", tie=True)), store, "tied")
    assert_every_cut_is_the_whole(store, store.manifest(name))


def test_the_text_settings_of_a_folder_reach_the_manifest(zoo: Path, store: Store) -> None:
    if "llama-int4" not in store.names():
        import_model(str(model_zoo.decoder_folder(zoo, "llama")), store, "llama-int4", "int4")
    spec = store.manifest("llama-int4").text
    assert spec is not None
    assert (spec.bos_token, spec.eos_token, spec.eos_token_ids) == ("<s>", "</s>", (1,))
    assert (spec.vocab_size, spec.context_length) == (model_zoo.VOCAB_SIZE, 1024)
    text = Text(spec, store.path(spec.tokenizer.digest))
    assert text.encode_messages([{"role": "user", "content": "the fox"}])[:2] == [0, 2]


@pytest.mark.slow
def test_what_the_builder_refuses_goes_through_torch(zoo: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import hugging_face, torch_export  # noqa: PLC0415

    def refuse_the_builder(arguments: list[object]) -> str | None:
        """The torch export in this process, which has torch already; that of the encoder is a process of its own."""
        if "onnxruntime_genai.models.builder" in arguments:
            return "KeyError: 'rope_type'"
        script, kind, source, path = map(str, arguments)
        assert (script, kind) == (torch_export.__file__, "decoder")
        Path(path).parent.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own uses of torch
            torch_export.export_decoder(source, path)
        return None

    monkeypatch.setattr(hugging_face, "_run", refuse_the_builder)
    folder = model_zoo.decoder_folder(zoo, "qwen3", layers=2)
    with pytest.raises(ResplitError, match="import it with precision fp32") as caught:
        import_model(str(folder), store, "dynamo", "int4")
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL and caught.value.field == "precision"
    import_model(str(folder), store, "dynamo")
    manifest = store.manifest("dynamo")
    assert "KeyError: 'rope_type'" in manifest.source
    assert [block.role for block in manifest.blocks] == ["embedding", "layer", "layer", "head"]
    assert {shared.role for shared in manifest.shared_inputs} == {SharedRole.ATTENTION_MASK, SharedRole.POSITION_IDS}
    assert [cache.layout for block in manifest.blocks for cache in block.kv] == ["concat"] * 2
    assert_every_cut_is_the_whole(store, manifest)


def test_a_cnn_is_cut_where_one_tensor_is_alive(zoo: Path, store: Store) -> None:
    import_model(str(model_zoo.cnn_file(zoo)), store, "cnn")
    manifest = store.manifest("cnn")
    assert manifest.kind is ModelKind.TENSOR
    assert {block.role for block in manifest.blocks} == {"segment"} and len(manifest.blocks) >= 4
    image = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    whole = Reference(store, "cnn").run({"image": image})["classes"]
    for cuts in every_cut(manifest):
        found = Stages(store, manifest, cuts).run({"image": image})["classes"]
        # ONNX Runtime adds a residual inside the convolution's kernel when it sees both, so a cut before the
        # addition rounds differently.
        assert np.abs(found - whole).max() <= 1e-6, cuts


def test_an_encoder_split_anywhere_gives_the_same_vectors(minilm: Store) -> None:
    store, name, layers = minilm, "minilm", 6
    manifest = store.manifest(name)
    assert manifest.kind is ModelKind.EMBEDDER
    assert manifest.text is not None and (manifest.text.pooling, manifest.text.normalize) == ("mean", True)
    assert [block.role for block in manifest.blocks] == ["embedding", *["layer"] * layers]
    assert [spec.name for spec in manifest.outputs] == ["last_hidden_state"]
    ids = np.random.default_rng(1).integers(4, 500, (2, 19))
    mask = np.ones_like(ids)
    mask[1, 11:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    whole = Reference(store, name).run(given)["last_hidden_state"]
    for cuts in every_cut(manifest):
        found = Stages(store, manifest, cuts).run(given)["last_hidden_state"]
        assert np.abs(found - whole).max() <= 1e-5, cuts


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def garble_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("harm", [truncate_weights, garble_config, lose_weights])
def test_a_harmed_folder_is_a_typed_error(
    zoo: Path, store: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = copy_of(model_zoo.decoder_folder(zoo, "llama"), tmp_path / "harmed")
    harm(folder)
    with pytest.raises(ResplitError, match="copy it again") as caught:
        import_model(str(folder), store)
    assert caught.value.code is ErrorCode.CORRUPT_FILE
    assert "harmed" not in store.names()


def test_an_encoder_decoder_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ResplitError, match="T5ForConditionalGeneration is an encoder-decoder") as caught:
        import_model(str(tmp_path), store)
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL


def test_a_prompt_longer_than_the_context_is_refused(zoo: Path, store: Store) -> None:
    if "llama-int4" not in store.names():
        import_model(str(model_zoo.decoder_folder(zoo, "llama")), store, "llama-int4", "int4")
    with pytest.raises(ResplitError) as caught:
        Reference(store, "llama-int4").generate(PROMPT, 100, context_tokens=CONTEXT)
    assert caught.value.code is ErrorCode.CONTEXT_EXCEEDED
