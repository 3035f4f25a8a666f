"""The decoder that speed is measured on: random weights, real shapes, made on the spot."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

from models.importer import import_model
from models.store import Store
from schemas.base import Digest

Precision = Literal["fp32", "int8", "int4"]
PARAMETERS = 702_000_000


def name_in(precision: Precision) -> str:
    """What the model is called in the store."""
    return f"bench-702m-{precision}"


NAME = name_in("int4")


def bench_model(folder: Path, precision: Precision = "int4") -> tuple[Store, Digest, Path]:
    """The store with the model in it, its digest, and the exported graph that onnxruntime-genai runs.

    A Llama of 24 layers, hidden size 1536, 702 M parameters, the same weights in every precision; made once, in about
    two minutes.
    """
    store, name = Store(folder / "store"), name_in(precision)
    exported = folder / ("genai" if precision == "int4" else f"genai-{precision}")
    if name not in store.names() or not (exported / "genai_config.json").exists():
        if not (folder / "hf" / "tokenizer.json").exists():
            _make(folder / "hf")
        _export(folder / "hf", exported, precision)
        import_model(str(exported), store, name)
    return store, store.resolve(name), exported


def _make(source: Path) -> None:
    import torch  # noqa: PLC0415 - only making the model needs it
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from tests.model_zoo import save_tokenizer  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    source.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).half().save_pretrained(source)
    save_tokenizer(source)


def _export(source: Path, target: Path, precision: Precision) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run(
        [*builder, "-i", source, "-o", target, "-p", precision, "-e", "cpu", "-c", source / "cache"], check=True
    )
