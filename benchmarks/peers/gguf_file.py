"""Write a Llama as GGUF from the very tensors of its ONNX graph. Runs in the peers' environment, which has `gguf`.

    python gguf_file.py TENSORS.json OUT.gguf

TENSORS.json is what `benchmarks.peers.weights` says of the model: its configuration, and of each tensor the file, the
type and the shape. The codes of 4- and 8-bit weights are kept as they are, in llama.cpp's order; their scales, one for
32 weights, are float32 in the graph and float16 in Q4_0 and Q8_0, and are rounded to that.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from codes import encoded, interleaved

Array = npt.NDArray[Any]
PROJECTIONS = {
    "attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Tensors:
    """The weights of an ONNX graph, by their names in it."""

    def __init__(self, described: dict[str, Any]) -> None:
        self._described = described

    def plain(self, name: str) -> Array:
        """As it is stored."""
        path, dtype, shape = self._described[name]
        return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))

    def matrix(self, name: str) -> tuple[Array, gguf.GGMLQuantizationType]:
        """A projection's weights, a row for each output: numbers, or rows of encoded bytes."""
        for bits, kind in ((4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)):
            if f"{name}.weight_Q{bits}" in self._described:
                codes = self.plain(f"{name}.weight_Q{bits}")
                scales = self.plain(f"{name}.weight_scales").reshape(codes.shape[:2])
                return encoded(codes, scales, bits), kind
        return np.ascontiguousarray(self.plain(f"{name}.weight").T), gguf.GGMLQuantizationType.F32


def write(described: dict[str, Any], path: Path) -> None:
    """The whole file."""
    config, tensors = described["config"], Tensors(described["tensors"])
    heads, kv_heads, head_dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(described["name"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(described["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokens(writer, config["vocab_size"], config["bos_token_id"], config["eos_token_id"])

    writer.add_tensor("token_embd.weight", tensors.plain("model.embed_tokens.weight"))
    for layer in range(config["num_hidden_layers"]):
        there, here = f"model.layers.{layer}", f"blk.{layer}"
        packed, kind = tensors.matrix(f"{there}.attn.qkv_proj.MatMul")
        q, k, v = np.split(packed, (heads * head_dim, (heads + kv_heads) * head_dim))
        writer.add_tensor(f"{here}.attn_q.weight", interleaved(q, heads), raw_dtype=kind)
        writer.add_tensor(f"{here}.attn_k.weight", interleaved(k, kv_heads), raw_dtype=kind)
        writer.add_tensor(f"{here}.attn_v.weight", np.ascontiguousarray(v), raw_dtype=kind)
        for theirs, ours in PROJECTIONS.items():
            rows, kind = tensors.matrix(f"{there}.{theirs}.MatMul")
            writer.add_tensor(f"{here}.{ours}.weight", rows, raw_dtype=kind)
        writer.add_tensor(f"{here}.attn_norm.weight", tensors.plain(f"{there}.input_layernorm.weight"))
        writer.add_tensor(f"{here}.ffn_norm.weight", tensors.plain(f"{there}.post_attention_layernorm.weight"))
    final = config["num_hidden_layers"]
    writer.add_tensor("output_norm.weight", tensors.plain(f"model.layers.{final}.final_norm_layernorm.weight"))
    rows, kind = tensors.matrix("lm_head.MatMul")
    writer.add_tensor("output.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: gguf.GGUFWriter, count: int, bos: int, eos: int) -> None:
    """A text for each token, plain ASCII, so that none is held back until a character is whole; prompts are ids."""
    types = [gguf.TokenType.NORMAL] * count
    types[bos] = types[eos] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(count)])
    writer.add_token_types(types)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
