"""Hugging Face folders to ONNX: onnxruntime-genai's builder for decoders, torch for the rest.

Both run in processes of their own, offline, on a local folder.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from models.text_files import read_json
from schemas.errors import ErrorCode, ResplitError

Precision = Literal["fp32", "fp16", "int4"]
HUB_PREFIX = "hf:"
# Weights once, in the format that carries no code.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
DECODER_SUFFIXES = ("ForCausalLM", "LMHeadModel")
EXPORT_SECONDS = 3600


def download(source: str) -> Path:
    """Fetch `hf:owner/name` from the Hugging Face hub, or find it in its cache. Raises UNREACHABLE."""
    _require("huggingface_hub")
    import huggingface_hub  # noqa: PLC0415 (optional: part of the `models` extra)

    name = source.removeprefix(HUB_PREFIX)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        # The hub client raises errors of several HTTP libraries; all mean that the model is not here.
        message = f"cannot fetch {name!r} from the Hugging Face hub ({_first_line(error)}); give a local folder"
        raise ResplitError(ErrorCode.UNREACHABLE, message, "source") from error


def is_decoder_folder(config: dict[str, Any]) -> bool:
    """Whether config.json describes a causal language model; raises UNSUPPORTED_MODEL for encoder-decoders."""
    name = architecture_of(config)
    if config.get("is_encoder_decoder"):
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"{name} is an encoder-decoder; decoders, encoders and plain ONNX graphs are supported",
            "source",
        )
    return name.endswith(DECODER_SUFFIXES)


def architecture_of(config: dict[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(names[0])


def export_decoder(folder: Path, out: Path, precision: Precision, provider: str) -> tuple[Path, str]:
    """Make an ONNX decoder of a folder; returns the file and a few words on what made it.

    The builder's fused operators are preferred. What it refuses goes through torch, in fp32 only: asking
    for less and getting more would surprise, so another precision raises UNSUPPORTED_MODEL.
    """
    check_weights(folder)
    _require("torch", "transformers", "onnxruntime_genai")
    # In fp16 the builder's CPU graph fails at run time; its CUDA graph runs on both.
    target = "cuda" if precision == "fp16" else provider
    command = ["-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out / "builder"]
    command += ["-p", precision, "-e", target, "-c", out / "cache"]
    refusal = _run(command)
    path = out / "builder" / "model.onnx"
    if refusal is None and path.is_file():
        return path, "onnxruntime-genai builder"
    if precision != "fp32":
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"the model builder cannot make {precision} of {folder.name} ({refusal}); import it with precision fp32",
            "precision",
        )
    path = out / "torch" / "model.onnx"
    _export_with_torch("decoder", folder, path)
    return path, f"torch export (the model builder refused: {refusal})"


def export_encoder(folder: Path, out: Path) -> tuple[Path, str]:
    """Make an ONNX encoder of a folder, fp32, with dynamic batch and sequence."""
    check_weights(folder)
    path = out / "torch" / "model.onnx"
    _export_with_torch("encoder", folder, path)
    return path, "torch export"


def check_weights(folder: Path) -> None:
    """Raise CORRUPT_FILE for a safetensors file that is truncated or not one, UNSUPPORTED_MODEL for none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL, f"{folder} has no *.safetensors; save the model in that format", "source"
        )
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    absent = sorted({str(name) for name in index.values()} - {path.name for path in files})
    if absent:
        raise ResplitError(
            ErrorCode.CORRUPT_FILE, f"{folder} lacks {absent[0]}, which its index names; copy it again", "source"
        )
    for path in files:
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if header_bytes > size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed = 8 + header_bytes + max(ends, default=0)
            if needed != size:
                raise ValueError(f"it has {size} bytes and its header promises {needed}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            message = f"{path} is corrupt: {error}; copy it again"
            raise ResplitError(ErrorCode.CORRUPT_FILE, message, "source") from error


def _export_with_torch(kind: str, folder: Path, path: Path) -> None:
    _require("torch", "transformers", "onnxscript")
    script = Path(__file__).with_name("torch_export.py")
    fault = _run([script, kind, folder, path])
    if fault is not None or not path.is_file():
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"torch could not export {folder.name} as {kind} ({fault}); export it to ONNX yourself and import that",
            "source",
        )


def _run(arguments: list[Any]) -> str | None:
    """Run Python with these arguments; None when it succeeded, else the last words of its standard error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *(str(argument) for argument in arguments)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=EXPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {EXPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def _require(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ResplitError(
                ErrorCode.MISSING_DEPENDENCY,
                f"importing from a Hugging Face folder needs {module}; pip install 'resplit[models]'",
            )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
