"""Who may ask a gateway: API keys in a TOML file, each as a hash alone, with what it may use.

    [keys.notebook]
    sha256 = "9f86d081..."
    models = ["assistant"]     # the deployments it may ask; every one, if nothing is said
    watch = true               # whether it opens the dashboard, the metrics and what they read

`resplit api-key NAME --file FILE` draws one. The file is read again when it changes: a key that was taken out opens
nothing any more.
"""

import base64
import binascii
import hashlib
import logging
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bus.remembered import PRIVATE, write_durably
from resplit.replies import RequestError
from schemas.base import DeploymentId, Sha256, Value
from schemas.errors import ErrorCode, ResplitError
from schemas.toml import document, validated

KEY_BYTES = 24
PREFIX = "rsp-"


class ApiKey(Value):
    """What the holder of one key may use."""

    sha256: Sha256
    models: tuple[DeploymentId, ...] | None = None
    watch: bool = False

    def check(self, deployment: str) -> None:
        """Raises `RequestError("forbidden")` for a deployment that it may not ask."""
        if self.models is not None and deployment not in self.models:
            raise RequestError("forbidden", f"this API key is not for {deployment!r}", "model")


EVERYTHING = ApiKey(sha256="0" * 64, watch=True)
"""Of a gateway without keys, which listens on loopback alone."""


class KeysFile(Value):
    """The whole file."""

    keys: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ApiKey] = Field(default_factory=dict)


def read_keys(path: Path) -> KeysFile:
    """Raises `ResplitError(INVALID_REQUEST)` naming the file, and the key in it that is at fault."""
    return validated(KeysFile, document(path, "file of API keys"), str(path))


def add_key(path: Path, name: str, models: tuple[str, ...] | None, watch: bool) -> str:
    """Draw a key, and write what it opens to the file. Raises `ResplitError(INVALID_REQUEST)` where the file names it
    already, and what `read_keys` raises."""
    before = ""
    if path.exists():
        if name in read_keys(path).keys:
            message = f"{path} has a key {name!r} already; choose another name, or delete its entry first"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
        before = path.read_text().rstrip("\n") + "\n\n"
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    write_durably(path, (before + _entry(name, _hash(key), models, watch)).encode(), PRIVATE)
    return key


def _entry(name: str, sha256: str, models: tuple[str, ...] | None, watch: bool) -> str:
    lines = [f"[keys.{name}]", f'sha256 = "{sha256}"']
    if models is not None:
        lines.append("models = [" + ", ".join(f'"{one}"' for one in models) + "]")
    if watch:
        lines.append("watch = true")
    return "\n".join(lines) + "\n"


log = logging.getLogger(__name__)


class Door:
    """Who is let in, by the file as it is now; a file that became unreadable leaves it as it was."""

    def __init__(self, path: Path | None) -> None:
        """Without a file everybody is. Raises what `read_keys` raises."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        if path is not None:
            self._read(path)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._path is None

    def opened_by(self, authorization: str | None) -> ApiKey:
        """What a request may use, by its header; raises `RequestError("unauthorized")`.

        A key comes as `Bearer KEY`, or as the password of `Basic`, as browsers send it."""
        if self._path is None:
            return EVERYTHING
        self._read_again(self._path)
        key = _key_in(authorization or "")
        if key is None:
            raise RequestError("unauthorized", "this gateway takes an API key: Authorization: Bearer KEY")
        # By hash: how long it takes to find says nothing of the keys.
        found = self._keys.get(_hash(key))
        if found is None:
            raise RequestError("unauthorized", "this API key is not known here")
        return found

    def _read_again(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        try:
            self._read(path)
        except ResplitError as error:
            self._stamp = stamp  # said once for each change
            log.warning("the API keys are those from before, also such as were taken out since: %s", error.message)

    def _read(self, path: Path) -> None:
        stamp = _stamp(path)  # before it is read: what changes meanwhile is read once more
        self._keys = {key.sha256: key for key in read_keys(path).keys.values()}
        self._stamp = stamp


def _key_in(authorization: str) -> str | None:
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer" and rest:
        return rest.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
    except (binascii.Error, UnicodeDecodeError):
        return None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
