"""Variants of a base: what an adapter makes of it, what they share, and which adapters are refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from models.lora import import_variant, read_inputs
from models.reference import Reference
from models.store import Store
from resplit.cli import app
from schemas.errors import ErrorCode, ResplitError
from tests import model_zoo
from tests.lora_zoo import adapter_folder, merged, model_zoo_sizes

PROMPT = [0, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def store(zoo: Path) -> Store:
    found = Store(zoo / "store")
    for name in ("llama-fp32", "llama-int4"):
        model_zoo.import_decoder(zoo, found, name)
    return found


def logits(store: Store, model: str) -> Any:
    reference = Reference(store, model)
    reference.generate(PROMPT, 1)
    return reference.logits[0]


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("k_proj", "v_proj"), ("o_proj", "gate_proj"), tuple(model_zoo_sizes())]
)
def test_a_variant_is_the_base_with_the_adapter_added_to_its_weights(
    zoo: Path, store: Store, targets: tuple[str, ...]
) -> None:
    import torch  # noqa: PLC0415

    adapter = adapter_folder(zoo, "-".join(targets), targets=targets)
    name, _ = import_variant("llama-fp32", str(adapter), store, "variant")
    with torch.no_grad():
        wanted = merged(model_zoo.decoder_folder(zoo, "llama"), adapter)(torch.tensor([PROMPT])).logits[0, -1].numpy()
    found = logits(store, name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found - logits(store, "llama-fp32")).max() > 0.1, "it is another model"


def test_without_an_adapter_it_is_the_base_bit_for_bit(store: Store) -> None:
    for base in ("llama-fp32", "llama-int4"):
        name, _ = import_variant(base, None, store, "roomy")
        np.testing.assert_array_equal(logits(store, name), logits(store, base))


def test_an_adapter_lies_over_a_quantised_base(zoo: Path, store: Store) -> None:
    adapter = adapter_folder(zoo, "over-int4")
    name, _ = import_variant("llama-int4", str(adapter), store, "quantised")
    moved = logits(store, name) - logits(store, "llama-int4")
    plain = logits(store, import_variant("llama-fp32", str(adapter), store, "plain")[0]) - logits(store, "llama-fp32")
    assert np.corrcoef(moved, plain)[0, 1] > 0.7, "it moves the logits as it moves those of the base in full precision"


def test_variants_share_everything_but_their_matrices(zoo: Path, store: Store) -> None:
    names = [
        import_variant("llama-fp32", str(adapter_folder(zoo, f"seed{seed}", seed=seed)), store, f"seed{seed}")[0]
        for seed in (1, 2)
    ]
    roomy, _ = import_variant("llama-fp32", None, store, "roomy")
    one, two, room, base = (store.manifest(name) for name in (*names, roomy, "llama-fp32"))
    assert [b.graph for b in one.blocks] == [b.graph for b in two.blocks] == [b.graph for b in room.blocks]
    assert [b.weights for b in one.blocks] == [b.weights for b in base.blocks]
    assert [b.adapter is None for b in one.blocks] == [b.role != "layer" for b in one.blocks]
    assert not any(b.adapter for b in room.blocks)
    own = set(one.blobs) - set(two.blobs)
    assert own == {str(b.adapter.digest) for b in one.blocks if b.adapter} | {str(one.whole.digest)}
    assert one.digest != two.digest
    block = one.blocks[1]
    assert block.adapter is not None and block.adapter in block.files
    fed = read_inputs(store.read(block.adapter.digest))
    assert sum(values.nbytes for values in fed.values()) <= block.adapter_bytes < 0.3 * block.session_bytes
    assert block.weight_bytes == block.session_bytes + block.adapter_bytes


def test_a_variant_of_a_variant_or_of_what_is_no_decoder_is_refused(zoo: Path, store: Store) -> None:
    adapter = str(adapter_folder(zoo, "plain"))
    name, _ = import_variant("llama-fp32", adapter, store, "once")
    with pytest.raises(ResplitError, match="has an adapter already") as caught:
        import_variant(name, adapter, store, "twice")
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL
    with pytest.raises(ResplitError) as unknown:
        import_variant("nothing", adapter, store, "none")
    assert unknown.value.code is ErrorCode.UNKNOWN_MODEL


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ],
)
def test_an_adapter_that_is_more_is_refused_by_its_setting(zoo: Path, store: Store, config: Any, why: str) -> None:
    adapter = adapter_folder(zoo, "more", **config)
    with pytest.raises(ResplitError, match=why) as caught:
        import_variant("llama-fp32", str(adapter), store, "more")
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL
    assert "more" not in store.names()


def test_an_adapter_for_another_model_is_refused_by_its_layer(zoo: Path, store: Store) -> None:
    wide = {**model_zoo_sizes(), "q_proj": (128, 64)}
    with pytest.raises(ResplitError, match="q_proj of layer 0 goes from 64 to 64 numbers, in the adapter from 128"):
        import_variant("llama-fp32", str(adapter_folder(zoo, "wide", sizes=wide)), store, "wide")
    deep = adapter_folder(zoo, "deep", layers=range(9))
    with pytest.raises(ResplitError, match="layer 4, which llama-fp32 does not have"):
        import_variant("llama-fp32", str(deep), store, "deep")


@pytest.mark.parametrize(
    ("files", "code", "why"),
    [
        ({}, ErrorCode.UNSUPPORTED_MODEL, "adapter_config.json"),
        ({"adapter_config.json": "{"}, ErrorCode.CORRUPT_FILE, "not valid JSON"),
        ({"adapter_model.safetensors": b""}, ErrorCode.CORRUPT_FILE, "cannot be read"),
        ({"adapter_model.safetensors": b"\xff" * 64}, ErrorCode.CORRUPT_FILE, "cannot be read"),
        ({"adapter_model.safetensors": {"lm_head.weight": np.zeros(2, np.float32)}}, None, "lm_head.weight"),
        ({"adapter_model.safetensors": {}}, None, "no tensors"),
    ],
)
def test_files_that_are_none_are_refused(
    tmp_path: Path, store: Store, files: dict[str, Any], code: ErrorCode | None, why: str
) -> None:
    folder = adapter_folder(tmp_path, "broken")
    for name, held in files.items():
        match held:
            case dict():
                save_file(held, folder / name)
            case bytes():
                (folder / name).write_bytes(held)
            case _:
                (folder / name).write_text(held)
    if not files:
        (folder / "adapter_config.json").unlink()
    with pytest.raises(ResplitError, match=re.escape(why)) as caught:
        import_variant("llama-fp32", str(folder), store, "broken")
    assert caught.value.code is (code or ErrorCode.UNSUPPORTED_MODEL)


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path, store: Store) -> None:
    folder = adapter_folder(tmp_path, "torn")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    good = np.zeros((4, 64), np.float32)
    for torn in (
        {"A": good},
        {"A": good, "B": np.zeros((64, 3), np.float32)},
        {"A": good * np.nan, "B": good.T.copy()},
    ):
        save_file(
            {f"{stem}{part}.weight": values for part, values in torn.items()}, folder / "adapter_model.safetensors"
        )
        with pytest.raises(ResplitError, match="layer 0, q_proj"):
            import_variant("llama-fp32", str(folder), store, "torn")


def test_the_command_says_what_is_the_variants_own(zoo: Path, store: Store) -> None:
    adapter = adapter_folder(zoo, "Tutor One")
    found = CliRunner().invoke(app, ["models", "adapt", "llama-fp32", str(adapter), "--store", str(store.root)])
    assert found.exit_code == 0, found.stderr
    assert "tutor-one: 6 blocks" in found.stdout and "of its own over" in found.stdout
    assert "tutor-one" in store.names()
    said = CliRunner().invoke(app, ["models", "adapt", "llama-fp32", "--store", str(store.root), "--json"])
    assert json.loads(said.stdout)["name"] == "llama-fp32-base"
    assert CliRunner().invoke(app, ["models", "adapt", "llama-fp32", "nowhere", "--store", str(store.root)]).exit_code
