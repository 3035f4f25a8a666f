"""The file that tells an agent which clouds it may ask: where they are, what they speak, what they cost.

Endpoints and their keys stay on the node. Plans name them, and nobody who can sign a plan can have prompts sent
anywhere that the operator of the node did not write down.
"""

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, model_validator

from schemas.base import NAME_PATTERN, Value
from schemas.errors import ErrorCode, ResplitError
from schemas.toml import document, validated

CLOUDS_MAX = 64
KEY_BYTES_MAX = 4096
PRICE_MAX = 1e9

Protocol = Literal["openai", "oip"]
Price = Annotated[float, Field(ge=0, le=PRICE_MAX)]


class Endpoint(Value):
    """One cloud. Prices are in whatever currency the operator counts in."""

    url: str
    """What comes before `/chat/completions` of an OpenAI-compatible endpoint, before `/v2/models` of one that speaks
    the Open Inference Protocol."""
    protocol: Protocol = "openai"
    key_file: str | None = None
    """Holds the key that is sent as a bearer token; next to this file unless it begins with `/`."""
    ca_file: str | None = None
    """Certificates that vouch for the endpoint; those of the system unless given."""
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """For one request, all attempts together."""
    in_flight: int = Field(default=16, ge=1, le=1024)
    """Requests of this agent at once."""
    price_request: Price = 0.0
    price_prompt: Price = 0.0
    """A million tokens."""
    price_output: Price = 0.0
    """A million tokens."""

    @model_validator(mode="after")
    def _is_private(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; write https://host/path")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"url is {self.url!r}; a key belongs into key_file, and nothing comes after the path")
        if parts.scheme == "http" and not _is_here(parts.hostname):
            raise ValueError(f"url is {self.url!r}; prompts and keys go over https, except to this machine")
        return self


class CloudsFile(Value):
    """All of the file: a table `[clouds.NAME]` for each."""

    clouds: dict[Annotated[str, StringConstraints(pattern=NAME_PATTERN)], Endpoint] = Field(max_length=CLOUDS_MAX)


@dataclass(frozen=True)
class KnownCloud:
    """An endpoint, and what opens it."""

    endpoint: Endpoint
    key: str | None
    tls: ssl.SSLContext | None
    """None: the system's."""


def read_clouds(path: Path) -> dict[str, KnownCloud]:
    """The clouds in a file, by name. Raises INVALID_REQUEST that names the file, the key and its value, also where a
    file that it names cannot be read, or can be read by others."""
    said = validated(CloudsFile, document(path, "list of clouds"), str(path))
    return {name: _opened(name, endpoint, path) for name, endpoint in said.clouds.items()}


def _opened(name: str, endpoint: Endpoint, path: Path) -> KnownCloud:
    key, tls = None, None
    if endpoint.key_file is not None:
        field = f"clouds.{name}.key_file"
        try:
            key = _key(path.parent / endpoint.key_file)
        except (OSError, ValueError) as error:
            message = f"{path}: {field} is {endpoint.key_file!r}: {error}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, field) from error
    if endpoint.ca_file is not None:
        field = f"clouds.{name}.ca_file"
        try:
            tls = ssl.create_default_context(cafile=path.parent / endpoint.ca_file)
        except (OSError, ValueError) as error:
            message = f"{path}: {field} is {endpoint.ca_file!r}: {error}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, field) from error
    return KnownCloud(endpoint, key, tls)


def _key(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_mode & 0o077:
            raise ValueError("others can read it; run `chmod 600` on it")
        data = file.read(KEY_BYTES_MAX + 1)
    key = data.decode("ascii", "replace").strip()
    if not key or len(data) > KEY_BYTES_MAX or not all("!" <= letter <= "~" for letter in key):
        raise ValueError("it is to hold one key, of printable characters without spaces")
    return key


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
