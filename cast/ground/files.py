"""Read lines, YAML and JSON; write whole files; turn names of files into text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

#: Python's characters for bytes in a file's name that are not UTF-8.
_SURROGATE = re.compile("[\udc80-\udcff]")


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice. YAML forbids it; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"sets {key.value} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def text_lines(text: str) -> list[str]:
    """The lines of a text, split at line feeds only, as Python splits files.

    `str.splitlines` also splits at a vertical tab, U+0085, U+2028 and others. Names of files and classes may contain
    these.
    """
    return text.removesuffix("\n").split("\n")


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name as text that can be printed and written anywhere: bytes that are not UTF-8 become `\\xe9`.

    Python reads such bytes as lone surrogates; no file, terminal or Parquet column takes these. Names in UTF-8 stay.
    """
    return _SURROGATE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", os.fspath(name))


def parse_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        yaml.YAMLError: the text is no YAML, or a mapping has a key twice; the message names the line.
    """
    return yaml.load(text, _Loader)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file is missing, or cannot be read.
        ValueError: the file is no JSON, or no text in UTF-8; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # editors put a byte order mark in front
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write under another name, then rename: a kill leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, with escapes for characters outside UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a newline at the end; see :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")
