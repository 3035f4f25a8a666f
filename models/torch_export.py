"""Export a Hugging Face model folder to ONNX with torch; a script of its own, run in its own process.

    python torch_export.py decoder|encoder FOLDER OUT.onnx

Own process: torch and transformers need seconds and gigabytes that the importing process should not
keep, and what goes wrong in them must end as one error. So this file imports nothing of the project.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """Token ids and mask [batch, sequence] to `last_hidden_state` [batch, sequence, width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(torch.nn.Module):  # type: ignore[misc]
    """One step with a cache: logits, then key and value of every layer with the new tokens appended."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        cache = transformers.DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


def export_encoder(folder: str, out: str) -> None:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.ones(2, 7, dtype=torch.long)
    axes = {0: "batch", 1: "sequence"}
    names = ["input_ids", "attention_mask"]
    _export(Encoder(model), (ids, ids.clone()), out, names, ["last_hidden_state"], (axes, axes))


def export_decoder(folder: str, out: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, new, old = 2, 3, 5
    past = [torch.zeros(batch, heads, old, head_dim) for _ in range(2 * layers)]
    positions = torch.arange(old, old + new)[None].repeat(batch, 1)
    mask = torch.ones(batch, old + new, dtype=torch.long)
    ids = torch.ones(batch, new, dtype=torch.long)
    each = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    row = {0: "batch", 1: "sequence"}
    _export(
        Decoder(model),
        (ids, mask, positions, *past),
        out,
        ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{part}" for i, part in each)],
        ["logits", *(f"present.{i}.{part}" for i, part in each)],
        (row, {0: "batch", 1: "total"}, row, tuple({0: "batch", 2: "past"} for _ in past)),
    )


def _export(
    model: Any, example: tuple[Any, ...], out: str, inputs: list[str], outputs: list[str], axes: tuple[Any, ...]
) -> None:
    torch.onnx.export(
        model.eval(),
        example,
        out,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=axes,
        dynamo=True,
        external_data=True,
        verbose=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("decoder", "encoder"))
    parser.add_argument("folder")
    parser.add_argument("out")
    chosen = parser.parse_args()
    Path(chosen.out).parent.mkdir(parents=True, exist_ok=True)
    (export_decoder if chosen.kind == "decoder" else export_encoder)(chosen.folder, chosen.out)
