"""Write files wholly or not at all, and compute their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message says why, what is still whole, and what to do."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and wait until the disk has it.

    Raises:
        OSError: the disk is full, or the write failed for another reason.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    flush(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, with escapes for characters outside UTF-8, and wait until the disk has it."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    flush(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from None
    return found


def flush(path: Path) -> None:
    """Wait until the disk has a file, or a directory's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
