"""A model folder's tokenizer and text settings, from the several files in which exporters leave them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from models.store import Store
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import TextSpec

# What a model without any word on its context gets; the graph may well take more.
DEFAULT_CONTEXT = 2048
TOKENIZER_FILE = "tokenizer.json"


def has_tokenizer(folder: Path) -> bool:
    return (folder / TOKENIZER_FILE).is_file()


def read_text_spec(folder: Path, store: Store, embedder_rank: int | None) -> TextSpec:
    """The text settings of a model folder; its `tokenizer.json` goes into the store.

    `embedder_rank` is the rank of an embedder's output ([batch, sequence, width] wants pooling, [batch,
    width] has it in the graph), None for a decoder. Raises CORRUPT_FILE for files that are not what their
    names say, UNSUPPORTED_MODEL where there is no `tokenizer.json`.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"{folder} has no {TOKENIZER_FILE}; save one with the model's AutoTokenizer.save_pretrained",
            "source",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises plain Exception for every fault of the file.
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{path} is not a tokenizer ({error})", "source") from error
    settings = read_json(folder / "tokenizer_config.json")
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    genai = read_json(folder / "genai_config.json").get("model", {})
    places = (generation, genai, config)
    eos_token = _token(settings.get("eos_token")) or _token_of_id(tokenizer, places, "eos_token_id")
    pooling, normalize = _pooling(folder, embedder_rank)
    return TextSpec(
        tokenizer=store.put_file(path),
        chat_template=_chat_template(folder, settings),
        bos_token=_token(settings.get("bos_token")) or _token_of_id(tokenizer, places, "bos_token_id"),
        eos_token=eos_token,
        eos_token_ids=_eos_ids(tokenizer, places, eos_token),
        vocab_size=max(_first_int((config, genai), "vocab_size") or 0, tokenizer.get_vocab_size()),
        context_length=_context(folder, (genai, config), settings),
        pooling=pooling,
        normalize=normalize,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises CORRUPT_FILE for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ResplitError(
            ErrorCode.CORRUPT_FILE, f"{path} is not valid JSON ({error}); copy it again", "source"
        ) from error
    if not isinstance(found, dict):
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{path} holds no JSON object; copy it again", "source")
    return found


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Some tokenizers carry several templates by name; tool use and the like are not driven here.
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _token_of_id(tokenizer: Tokenizer, places: Iterable[dict[str, Any]], key: str) -> str | None:
    token_id = next((i for place in places for i in _ids(place.get(key))), None)
    found = None if token_id is None else tokenizer.id_to_token(token_id)
    return found if isinstance(found, str) else None


def _eos_ids(tokenizer: Tokenizer, places: Iterable[dict[str, Any]], eos_token: str | None) -> tuple[int, ...]:
    found = dict.fromkeys(i for place in places for i in _ids(place.get("eos_token_id")))
    if eos_token is not None and (token_id := tokenizer.token_to_id(eos_token)) is not None:
        found.setdefault(token_id)
    return tuple(found)


def _ids(entry: Any) -> list[int]:
    entries = entry if isinstance(entry, list) else [entry]
    return [i for i in entries if isinstance(i, int) and not isinstance(i, bool)]


def _first_int(places: Iterable[dict[str, Any]], key: str) -> int | None:
    return next((place[key] for place in places if isinstance(place.get(key), int) and place[key] > 0), None)


def _context(folder: Path, places: tuple[dict[str, Any], ...], settings: dict[str, Any]) -> int:
    limits = [
        _first_int(places, "context_length"),
        _first_int(places, "max_position_embeddings"),
        _first_int([read_json(folder / "sentence_bert_config.json")], "max_seq_length"),
    ]
    known = [limit for limit in limits if limit is not None]
    # A tokenizer without a limit writes a huge number here, so it only counts where nothing else does.
    fallback = _first_int([settings], "model_max_length") or DEFAULT_CONTEXT
    return min(known) if known else min(fallback, 1 << 20)


def _pooling(folder: Path, rank: int | None) -> tuple[Literal["mean", "cls"] | None, bool]:
    if rank is None:
        return None, False
    modules_file = folder / "modules.json"
    try:
        modules = json.loads(modules_file.read_text(encoding="utf-8")) if modules_file.is_file() else []
        normalize = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    except (ValueError, AttributeError) as error:
        raise ResplitError(
            ErrorCode.CORRUPT_FILE, f"{modules_file} is not a list of modules ({error})", "source"
        ) from error
    if rank < 3:
        return None, normalize
    pooling = read_json(folder / "1_Pooling" / "config.json")
    by_first = bool(pooling.get("pooling_mode_cls_token")) or pooling.get("pooling_mode") == "cls"
    return ("cls" if by_first else "mean"), normalize
