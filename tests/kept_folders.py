"""Folders that a refused step leaves as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.errors import ErrorCode, ResplitError


def content(folder: Path) -> dict[str, bytes]:
    """What each file holds; nothing where there is no folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def refused(code: ErrorCode, why: str, folder: Path, step: Callable[[], object]) -> None:
    """That `step` is refused with this code and sentence, and every file in `folder` is what it was."""
    before = content(folder)
    with pytest.raises(ResplitError, match=why) as caught:
        step()
    assert caught.value.code is code
    assert content(folder) == before
