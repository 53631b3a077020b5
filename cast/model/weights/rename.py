"""Key maps: tables of (pattern, name), and their application."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: (pattern for the whole key, our name). The name may use the pattern's groups. None: the key is known and not needed.
#: A name that ends in [q], [k] or [v] is one third of a packed tensor.
KeyMap = Sequence[tuple[str, str | None]]


def translate(tensors: Mapping[str, Tensor], key_map: KeyMap) -> tuple[dict[str, Tensor], list[str]]:
    """Rename by the first pattern that matches, and pack separate query, key and value tensors.

    Returns:
        Tensors under our names, and the keys that no pattern matches.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        for pattern, name in key_map:
            if match := re.fullmatch(pattern, key):
                if name is not None:
                    renamed[match.expand(name)] = tensor
                break
        else:
            unknown.append(key)
    return _pack(renamed), unknown


def _pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join `name[q]`, `name[k]`, `name[v]` along the rows. An incomplete trio stays, and is later unknown."""
    packed = dict(tensors)
    for name in [key.removesuffix("[q]") for key in tensors if key.endswith("[q]")]:
        parts = [f"{name}[{letter}]" for letter in "qkv"]
        if all(part in packed for part in parts):
            packed[name] = torch.cat([packed.pop(part) for part in parts])
    return packed
