"""LoRA adapters with drawn weights for the tests, as PEFT saves them, and what they make of a torch model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests import model_zoo

TARGETS = ("q_proj", "v_proj", "down_proj")
RANK = 4
ALPHA = 8


def adapter_folder(
    root: Path, name: str, *, targets: Iterable[str] = TARGETS, layers: Iterable[int] = range(model_zoo.LAYERS),
    seed: int = 0, sizes: Any = None, **config: Any,
) -> Path:  # fmt: skip
    """An adapter for the zoo's decoders of width 64."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for layer in layers:
        for projection in targets:
            rows, columns = (sizes or model_zoo_sizes())[projection]
            draw = np.random.default_rng([seed, layer, *projection.encode()])
            stem = f"base_model.model.model.layers.{layer}.{_part(projection)}.{projection}"
            tensors[f"{stem}.lora_A.weight"] = draw.normal(0, 0.3, (RANK, rows)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = draw.normal(0, 0.3, (columns, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder


def model_zoo_sizes() -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer of a tiny llama."""
    return {
        **{"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)},
        **{"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)},
    }


def merged(folder: Path, adapter: Path) -> Any:
    """The torch model of a Hugging Face folder with an adapter added to its weights."""
    import torch  # noqa: PLC0415
    from safetensors.numpy import load_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        up = tensors[name.replace("lora_A", "lora_B")]
        with torch.no_grad():
            module.weight += torch.from_numpy(ALPHA / RANK * (up @ down))
    return model


def _part(projection: str) -> str:
    return "self_attn" if projection[0] in "qkvo" else "mlp"
