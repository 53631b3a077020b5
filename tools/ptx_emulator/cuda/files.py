"""Records in files: an npz archive of the buffers, with the rest beside them as `record.json`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ptx_emulator.cuda.record import Given, Pointer, Record, Struct, Tiled

_JSON = "record.json"
_PLAIN = ("ptx", "kernel", "grid", "block", "shared_bytes", "cluster", "target")


def save(record: Record, path: Path) -> None:
    """Write a record, with its buffers as they are now, to a file, which is replaced."""
    known = {name: getattr(record, name) for name in _PLAIN}
    known["arguments"] = [_plain(given) for given in record.arguments]
    known["offsets"] = dict(record.offsets)
    known["buffers"] = list(record.buffers)  # their arrays are numbered in this order
    with path.open("wb") as file:
        np.savez(file, *record.buffers.values())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_JSON, json.dumps(known, indent=1))


def load(path: Path) -> Record:
    """Read a record that `save` wrote. No code of the file runs.

    Raises:
        ValueError: the file is no such record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            known: dict[str, Any] = json.loads(archive.read(_JSON))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no record of a launch: {error}") from error
    with np.load(path, allow_pickle=False) as arrays:
        buffers = {name: arrays[f"arr_{number}"] for number, name in enumerate(known["buffers"])}
    return Record(
        ptx=known["ptx"],
        kernel=known["kernel"],
        grid=_three(known["grid"]),
        block=_three(known["block"]),
        arguments=tuple(_given(one) for one in known["arguments"]),
        buffers=buffers,
        shared_bytes=known["shared_bytes"],
        cluster=None if known["cluster"] is None else _three(known["cluster"]),
        target=known["target"],
        offsets=known.get("offsets", {}),  # files of earlier versions have none
    )


def _three(numbers: list[int]) -> tuple[int, int, int]:
    x, y, z = numbers
    return x, y, z


def _plain(given: Given) -> Any:
    """An argument as JSON has it: a number, or an object that says what it is."""
    if isinstance(given, Pointer):
        return {"pointer": vars(given)}
    if isinstance(given, Tiled):
        return {"tensor map": {**vars(given), "start": vars(given.start)}}
    if isinstance(given, Struct):
        return {"struct": given.data.hex(), "inside": [[at, _plain(what)] for at, what in given.inside.items()]}
    return {"bytes": given.hex()} if isinstance(given, bytes) else given


def _given(plain: Any) -> Given:
    if isinstance(plain, int | float):
        return plain
    if "bytes" in plain:
        return bytes.fromhex(plain["bytes"])
    if "struct" in plain:
        return Struct(bytes.fromhex(plain["struct"]), {at: _placed(what) for at, what in plain["inside"]})
    return _placed(plain)


def _placed(plain: Any) -> Pointer | Tiled:
    if "pointer" in plain:
        return Pointer(**plain["pointer"])
    tile = plain["tensor map"]
    sizes, strides, box = (tuple(tile[name]) for name in ("sizes", "strides", "box"))
    return Tiled(Pointer(**tile["start"]), tile["type"], sizes, strides, box, tile["swizzle"], tile["fill"])
