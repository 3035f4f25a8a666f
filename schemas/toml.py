"""Values as TOML files: read strictly, and refused in the words of the file."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError

V = TypeVar("V", bound=Value)

FILE_BYTES_MAX = 4 << 20
"""Ten thousand sites and as many faults are about two megabytes."""


def document(path: Path, what: str, hint: str = "") -> dict[str, Any]:
    """The tables of a file that is to hold a `what`. Raises `ResplitError(INVALID_REQUEST)` that names the file; `hint`
    is said of one that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise refused(f"cannot read {path}: {error.strerror}{hint}", "file") from error
    if len(data) > FILE_BYTES_MAX:
        raise refused(f"{path} has more than {FILE_BYTES_MAX} bytes and is no {what}", "file")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise refused(f"{path} is not valid TOML: {error}", "file") from error


def validated(kind: type[V], plain: Mapping[str, Any], source: str) -> V:
    """What a file says, as a value. Raises `ResplitError(INVALID_REQUEST)` naming the source, the key with dots, its
    value, and for a key that there is not the nearest one that there is."""
    try:
        return kind.model_validate(_strict(plain), strict=True)
    except ValidationError as error:
        raise _explained(kind, error.errors(include_url=False), plain, source) from error


def _strict(plain: object) -> Any:
    """What a file says, so that it can be read strictly: arrays are tuples, and 3e9 is a whole number."""
    match plain:
        case Mapping():
            return {key: _strict(value) for key, value in plain.items()}
        case list() | tuple():
            return tuple(_strict(value) for value in plain)
        case float() if plain.is_integer():
            return int(plain)
    return plain


RANKS = {"extra_forbidden": 0, "tuple_type": 2, "missing": 3, "too_short": 4}
"""A misspelt key is also a missing one, and an array with a wrong entry also too short: the cause is named. Where a
word may stand for an array, the words are."""
TOML_TYPES = {
    "tuple_type": "an array is needed here",
    "dict_type": "a table is needed here",
    "model_type": "a table is needed here",
    "missing": "a value is needed here",
}


def _explained(
    kind: type[Value], errors: Sequence[ErrorDetails], plain: Mapping[str, Any], source: str
) -> ResplitError:
    first = min(errors, key=lambda error: RANKS.get(error["type"], 1))
    # Where a value may be of several types, pydantic names the type between the keys: `tuple[Stage, ...]`.
    path = [str(part) for part in first["loc"] if "[" not in str(part)]
    value = first["input"]
    if first["type"] == "extra_forbidden":
        what = f"{no_key(path[-1], keys_at(kind, path[:-1], plain))} (got {shown(value)})"
    elif first["type"] in TOML_TYPES:
        what = TOML_TYPES[first["type"]] + ("" if first["type"] == "missing" else f" (got {shown(value)})")
    elif isinstance(value, Mapping):
        # A check of a whole table says itself which key of it is at fault.
        told = first["msg"].removeprefix("Value error, ")
        if (named := re.match(r"([a-z_]+(?:\.\w+)*): (.*)", told, re.DOTALL)) is not None:
            path, what = [*path, *named[1].split(".")], named[2]
        else:
            what = told
    else:
        what = f"{first['msg']} (got {shown(value)})"
    key = ".".join(path)
    return refused(f"{source}: {key}: {what}" if key else f"{source}: {what}", key or "file")


def no_key(name: str, known: Sequence[str]) -> str:
    # A part of a key, or a key and more, is nearer than what happens to share letters with it.
    alike = [key for key in known if name and (key.startswith(name) or name.startswith(key))]
    near = get_close_matches(name, alike, 1, cutoff=0.0) or get_close_matches(name, known, 1)
    if near:
        return f"there is no key {name!r}; did you mean {near[0]!r}?"
    return f"there is no key {name!r}; the keys here are {', '.join(known)}" if known else f"there is no key {name!r}"


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def keys_at(root: type[Value], path: Sequence[str], plain: object) -> list[str]:
    """The keys that a table may have: its fields, or where it is open those that it has."""
    kind = _kind_at(root, path)
    if isinstance(kind, type) and issubclass(kind, Value):
        return [*kind.model_fields]
    for part in path:
        if isinstance(plain, list | tuple) and part.isdecimal() and int(part) < len(plain):
            plain = plain[int(part)]
        elif isinstance(plain, Mapping):
            plain = plain.get(part)
    return [*plain] if isinstance(plain, Mapping) else []


def _kind_at(root: type[Value], path: Sequence[str]) -> Any:
    """The type of what stands at a path in such a value; None where there is nothing."""
    kind: Any = root
    for part in path:
        if isinstance(kind, type) and issubclass(kind, Value):
            field = kind.model_fields.get(part)
            kind = None if field is None else _plain_type(field.annotation)
        elif get_origin(kind) is tuple:
            kind = _plain_type(get_args(kind)[0])
        elif get_origin(kind) is dict:
            kind = _plain_type(get_args(kind)[1])
        else:
            return None
    return kind


def _plain_type(kind: Any) -> Any:
    """Without what is said about it, and without None."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType):
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        else:
            return kind


def refused(message: str, key: str) -> ResplitError:
    """What is said of a file that is no good."""
    return ResplitError(ErrorCode.INVALID_REQUEST, message, key)
