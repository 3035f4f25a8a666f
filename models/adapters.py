"""A LoRA adapter as PEFT saves it, read so that it can be laid over the linear layers of a graph.

For a linear layer y = x W it holds A of shape [r, in] and B of shape [out, r], and means y + (alpha / r) x A^T B^T
(Hu et al. 2021, arXiv 2106.09685, section 4.1). What it may hold besides, and is not read here, is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.text_files import read_json
from schemas.errors import ErrorCode, ResplitError
from schemas.tensor import Array

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
NAME = re.compile(
    r"^base_model\.model\.(?:.*\.)?layers\.(\d+)\.(?:self_attn|attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight$"
)
UNREAD = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "whole modules",
    "alpha_pattern": "a scale for each layer",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed weights",
}
"""Settings that, where they are made, say that the adapter is more than A and B."""


@dataclass(frozen=True)
class Delta:
    """What is added to one linear layer: x `down` `up`. `down` is [in, r], `up` [r, out], scaled; float32."""

    down: Array
    up: Array


@dataclass(frozen=True)
class Adapter:
    """One adapter: its deltas by layer and projection (`q_proj`, `down_proj`, ...)."""

    name: str
    deltas: Mapping[tuple[int, str], Delta]


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder that PEFT saved. Raises CORRUPT_FILE for files that are not what their names say, and
    UNSUPPORTED_MODEL for an adapter that is more, or other, than low-rank matrices."""
    config = read_json(folder / CONFIG_FILE)
    if not config:
        raise _refused(f"{folder} holds no {CONFIG_FILE}; give the folder that `save_pretrained` of PEFT wrote")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(f"{folder / CONFIG_FILE} says peft_type {kind!r}; LORA is what can be laid over a model")
    for key, what in UNREAD.items():
        if config.get(key):
            raise _refused(f"{folder / CONFIG_FILE} sets {key}, so that the adapter holds {what}, which is not applied")
    if config.get("bias", "none") != "none":
        raise _refused(f"{folder / CONFIG_FILE} says bias {config['bias']!r}; biases are not applied")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _refused(f"{folder / CONFIG_FILE} says lora_alpha {alpha!r}, which is no number")
    pairs = _pairs(folder / TENSORS_FILE)
    stabilised = bool(config.get("use_rslora"))
    return Adapter(folder.name, {key: _delta(key, pair, float(alpha), stabilised) for key, pair in pairs.items()})


def _pairs(path: Path) -> dict[tuple[int, str], dict[str, Array]]:
    found: dict[tuple[int, str], dict[str, Array]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                match = NAME.match(name)
                if match is None:
                    raise _refused(
                        f"{path} holds {name!r}; only `...layers.N....X_proj.lora_A` and `lora_B` are applied"
                    )
                pair = found.setdefault((int(match[1]), match[2]), {})
                pair[match[3]] = np.asarray(file.get_tensor(name), np.float32)
    except FileNotFoundError as error:
        raise _refused(f"{path} does not exist; save the adapter with `safe_serialization=True`") from error
    except (SafetensorError, OSError, TypeError) as error:
        message = f"{path} cannot be read: {error}; save it as float32 or float16 and copy it again"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, "source") from error
    if not found:
        raise _refused(f"{path} holds no tensors")
    return found


def _delta(key: tuple[int, str], pair: dict[str, Any], alpha: float, stabilised: bool) -> Delta:
    layer, projection = key
    down, up = pair.get("A"), pair.get("B")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise _refused(f"layer {layer}, {projection}: lora_A and lora_B are no pair of matrices of one rank")
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise _refused(f"layer {layer}, {projection}: a value is not finite")
    rank = down.shape[0]
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    return Delta(np.ascontiguousarray(down.T), np.ascontiguousarray(scale * up.T, np.float32))


def _refused(message: str) -> ResplitError:
    return ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "source")
