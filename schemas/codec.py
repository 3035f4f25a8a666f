"""The one canonical encoding of values, and bounded decoding of bytes that came from outside."""

import json
from typing import Any, TypeVar

import msgpack
from pydantic import BaseModel, ValidationError

from schemas.errors import ErrorCode, ResplitError
from schemas.flat import check_announced

JSON = "application/json"
MSGPACK = "application/msgpack"
SEALED = "application/vnd.resplit.sealed.v1"
"""A sealed request, or a reply to one. In which encoding it was written stands inside."""
CONTENT_TYPE = "Content-Type"
REQUEST_ID = "Resplit-Request"
"""The header by which a sealed request names its id: its letter opens for that alone."""

# msgpack spends one byte on an empty array and Python 64: bounding the elements, not just the bytes,
# keeps a hostile megabyte from becoming a hundred.
MAX_ELEMENTS = 200_000
MAX_DEPTH = 32

V = TypeVar("V", bound=BaseModel)


def encode(value: BaseModel) -> bytes:
    """The canonical bytes of a value: JSON, keys in field order, no spaces, nulls left out."""
    return value.model_dump_json(exclude_none=True).encode()


def decode(kind: type[V], data: bytes, what: str) -> V:
    """Read a canonical JSON value of type `kind`; raises `ResplitError(INVALID_REQUEST)` naming the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise ResplitError.from_validation(error, what) from error


def decode_as(kind: type[V], data: bytes, content_type: str, what: str) -> V:
    """Read JSON or msgpack, as `content_type` says, into a value of type `kind`.

    Raises `ResplitError(INVALID_REQUEST)` on malformed, over-deep or over-long input.
    """
    try:
        return kind.model_validate(decode_plain(data, content_type, what))
    except ValidationError as error:
        raise ResplitError.from_validation(error, what) from error


def decode_plain(data: bytes, content_type: str, what: str) -> Any:
    """Read JSON or msgpack into plain Python values, bounded in depth and number of elements."""
    media_type = media_type_of(content_type)
    try:
        if media_type == MSGPACK:
            check_announced(data)
            plain = msgpack.unpackb(
                data,
                max_array_len=MAX_ELEMENTS,
                max_map_len=MAX_ELEMENTS,
                max_str_len=len(data),
                max_bin_len=len(data),
                max_ext_len=0,
                strict_map_key=True,
            )
        elif media_type in (JSON, ""):
            plain = json.loads(data)
        else:
            raise ResplitError(
                ErrorCode.INVALID_REQUEST,
                f"{what}: content type {media_type!r} is not known; use {JSON} or {MSGPACK}",
                CONTENT_TYPE,
            )
    except ResplitError:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        name = "msgpack" if media_type == MSGPACK else "JSON"
        reason = str(error) or type(error).__name__
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{what} is not valid {name}: {reason}") from error
    _check_bounds(plain, what)
    return plain


def encode_as(value: BaseModel, content_type: str) -> bytes:
    """The bytes of a value in the encoding its reader asked for."""
    if media_type_of(content_type) == MSGPACK:
        packed: bytes = msgpack.packb(value.model_dump(mode="python", exclude_none=True))
        return packed
    return encode(value)


def media_type_of(content_type: str) -> str:
    """A content type without its parameters, which nobody reads."""
    return content_type.split(";", maxsplit=1)[0].strip().lower()


def _check_bounds(plain: Any, what: str) -> None:
    elements = 0
    layer = [plain]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in layer:
            match item:
                case dict():
                    below.extend(item)
                    below.extend(item.values())
                case list():
                    below.extend(item)
                case str():
                    _check_text(item, what)
        elements += len(below)
        if elements > MAX_ELEMENTS:
            message = f"{what} has more than {MAX_ELEMENTS} elements; send large tensors in binary form"
            raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
        if not below:
            return
        layer = below
    raise ResplitError(ErrorCode.INVALID_REQUEST, f"{what} is nested deeper than {MAX_DEPTH}")


def _check_text(text: str, what: str) -> None:
    # JSON can spell half of a surrogate pair, which no encoder takes again.
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        message = f"{what} holds text that is not Unicode: half of a surrogate pair"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message) from error
