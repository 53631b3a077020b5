"""Read tensors from a TorchScript archive without running its program.

`torch.jit.load` compiles the archive's program and may run parts of it. The weights do not need that. The archive is a
zip file: `data.pkl` has the module tree, `data/` has the raw storages. This unpickler accepts plain containers, tensors
and inert objects, and refuses everything else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Object:
    """Stands for any module of the archive: an object with attributes."""


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive with a TorchScript program (plain torch files have no constants.pkl)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """All tensors of the archive's module tree by dotted name, as the module's `state_dict()` has them.

    Raises:
        pickle.UnpicklingError: the archive refers to something other than modules, tensors and plain containers.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).split("/")[0]
        with archive.open(f"{root}/data.pkl") as file:
            reader = _Unpickler(file)
            reader.storage_bytes = lambda key: archive.read(f"{root}/data/{key}")
            return dict(_tensors(reader.load(), ""))


class _Unpickler(pickle.Unpickler):
    """Accepts the few names that a TorchScript module tree needs; refuses to import any other."""

    storage_bytes: Callable[[str], bytes]

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Object
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"no module tree needs {module}.{name}; refused")
        return known[module, name]

    def persistent_load(self, identity: Any) -> Tensor:
        _, dtype, key, _, size = identity
        if not size:  # frombuffer refuses an empty buffer
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.storage_bytes(key)), dtype=dtype, count=size)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(node: object, prefix: str) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(node).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Object):
            found += _tensors(value, f"{prefix}{name}.")
    return found
