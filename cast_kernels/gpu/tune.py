"""`cast-kernels tune`: tiles measured on the GPU of this machine, as entries for `cast_kernels/triton/tiles.py`.

The library never tunes while it runs: a person reviews and commits this command's output.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from cast_kernels.evidence.cases import Case, compare, poisoned_memory, run
from cast_kernels.gpu.check import NO_GPU
from cast_kernels.gpu.machine import CudaMachine, Machine, NoGPUError, Step, UnusableError, require_usable
from cast_kernels.gpu.timing import median_ms
from cast_kernels.triton import tiles
from cast_kernels.triton.common import architecture
from cast_kernels.triton.tiles import SAME_K, Tile, TileSet

#: (dtype, channels of the bottleneck) that are tuned, one entry of the table each.
PROBLEMS = ((torch.bfloat16, 384), (torch.bfloat16, 768), (torch.float32, 384))
_CONTRACTION = ("rows", "k", "columns", "warps", "stages")
_ATTENTION = ("queries", "keys", "key_stages")
#: Parts of a set -> the fields that their kernels read, in the order of tuning. Forward's come first, because
#: backward's time depends on them. `exchange` and `exchange_backward` share `k`: a set refuses unequal ones.
PARTS: dict[str, tuple[str, ...]] = {
    "row": (*_CONTRACTION, "widen_stages", *_ATTENTION),
    "project": (*_CONTRACTION, "widen_stages"),
    "exchange": (*_CONTRACTION, "widen_stages", *_ATTENTION),
    "exchange_short": ("rows", "queries"),
    "exchange_backward": ("rows", "columns", "warps", "stages"),
    "project_backward": ("rows", "k", "warps", "stages"),
    "weight_gradient": _CONTRACTION,
    "attention_backward": ("warps", *_ATTENTION),
    "attention_backward_short": ("warps", "queries"),
}
#: Parts of a set, and a field of `weight_gradient`, that no trial changes or runs. An entry's source says so.
NOT_TUNED = ("adapter_forward", "adapter_backward", "attention_backward_wide", "project_wide", "few", "programs")
#: Values of each field: powers of two, because Triton needs them, from the tensor cores' smallest size on.
_VALUES: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128, 256), "k": (16, 32, 64, 128), "columns": (32, 64, 128, 256), "warps": (4, 8, 16),
    "stages": (1, 2, 3, 4, 5), "widen_stages": (1, 2, 3), "queries": (16, 32, 64, 128), "keys": (16, 32, 64, 128),
    "key_stages": (1, 2, 3),
}  # fmt: skip
#: `weight_gradient` takes several products side by side, so its columns may be three times a power of two.
_WIDE_COLUMNS = (32, 64, 128, 256, 384)
#: The search takes a tile only if it is this much faster: less is noise.
_GAIN = 0.01
_BATCH = 6
_REPEATS = 20

#: Milliseconds of a set of tiles. RefusedError: it cannot be used.
Time = Callable[[TileSet], float]


class RefusedError(RuntimeError):
    """Tiles that do not compile, do not fit, or compute wrong results; the message says which."""


@dataclass(frozen=True)
class Trial:
    """One tried tile."""

    part: str
    tile: Tile
    ms: float | None  # None: refused
    reason: str = ""


def search(start: TileSet, time: Time) -> tuple[TileSet, float, list[Trial]]:
    """Improve one part after the other, one step of one field at a time, until no step is faster.

    Args:
        start: must be usable.
        time: measures a set.

    Returns:
        The fastest set, its milliseconds, and every trial.

    Raises:
        RefusedError: `start` cannot be used.
    """
    best, least = start, time(start)
    trials: list[Trial] = []
    for part in PARTS:
        seen = {best.of(part)}
        improved = True
        while improved:
            improved = False
            for candidate in neighbours(part, best.of(part)):
                if candidate in seen:
                    continue
                seen.add(candidate)
                try:
                    tried = _with(best, part, candidate)
                    ms = time(tried)
                except RefusedError as error:
                    trials.append(Trial(part, candidate, None, str(error)))
                    continue
                trials.append(Trial(part, candidate, ms))
                if ms < (1 - _GAIN) * least:
                    best, least, improved = tried, ms, True
    return best, least, trials


def _with(tile_set: TileSet, part: str, tile: Tile) -> TileSet:
    """The set with this tile for the part, and with its `k` for all kernels that must share it."""
    changes: dict[str, Any] = {part: tile}
    shared = [name for name in SAME_K if getattr(tile_set, name) is None]
    if tile.k != tile_set.of(part).k and (part in SAME_K or (part == "row" and shared)):
        follow = shared if part == "row" else [part]
        changes |= {name: replace(tile_set.of(name), k=tile.k) for name in SAME_K if name not in follow}
        few = tile_set.few.items()
        changes["few"] = {name: replace(own, k=tile.k) if name in SAME_K else own for name, own in few}
    return replace(tile_set, **changes)


def neighbours(part: str, tile: Tile) -> Iterator[Tile]:
    """Tiles of a part that differ by one step of one field that its kernels read."""
    for name in PARTS[part]:
        values = _WIDE_COLUMNS if (part, name) == ("weight_gradient", "columns") else _VALUES[name]
        at = values.index(getattr(tile, name))
        for step in (-1, 1):
            if 0 <= at + step < len(values):
                changes: dict[str, Any] = {name: values[at + step]}
                candidate = replace(tile, **changes)
                if "rows" not in PARTS[part] or "queries" not in PARTS[part] or not candidate.rows % candidate.queries:
                    yield candidate


def measured(machine: Machine, dtype: torch.dtype, case: Case, arch: str) -> Time:
    """A function that times a training step on the machine, if its results are right.

    A fault in a kernel ends the search by UnusableError: CUDA repeats its error at every later call.

    Args:
        machine: where it runs.
        dtype: of streams and parameters.
        case: checked as it is, timed with :data:`_BATCH` clips.
        arch: as the tile table names it.
    """
    exact = run(case, None, dtype, exact=True, device=machine.device)
    eager = run(case, "eager", dtype, device=machine.device)

    def time(candidate: TileSet) -> float:
        # Without `few={}`, tiles for few rows would replace the candidate in the check.
        with tiles.trying(arch, dtype.itemsize * 8, case.bottleneck, replace(candidate, few={})):
            try:
                with poisoned_memory():
                    ours = run(case, "triton", dtype, device=machine.device)
            except (TritonError, RuntimeError) as error:  # over a limit, or the compiler failed
                require_usable(machine)  # raises after a fault: then every call fails, whatever its tiles
                raise RefusedError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
            wrong = [error.name for error in compare(ours, eager, exact) if not error.ok]
            if wrong:
                raise RefusedError(f"wrong: {', '.join(wrong)}")
            return median_ms(machine, training_step(replace(case, batch=_BATCH), machine.device, dtype), _REPEATS)

    return time


def training_step(case: Case, device: torch.device, dtype: torch.dtype) -> Step:
    """Forward and backward of a case on fresh inputs."""
    made = case.module(dtype, "triton").to(device)
    shapes = [(case.batch, case.frames, n, case.dim) for n in (1 + case.patches, case.patches)]
    streams = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    gradients = [torch.randn_like(x) for x in streams]
    return lambda: torch.autograd.grad(made(*streams), [*streams, *made.parameters()], gradients)


def as_python(arch: str, bits: int, d: int, found: TileSet) -> str:
    """An entry of the table."""
    source = textwrap.wrap(found.source, 100, drop_whitespace=False)
    lines = [f'    ("{arch}", {bits}, {d > 384}): TileSet(', *(f'        "{line}"' for line in source)]
    lines[-1] += ","
    own = {item.name: getattr(found, item.name) for item in fields(found)}
    lines += [f"        {name}={tile!r}," for name, tile in own.items() if isinstance(tile, Tile)]
    if found.few:
        lines += [f"        few_rows={found.few_rows},", f"        few={dict(found.few)!r},"]
    return "\n".join([*lines, "    ),"])


def main(write: Path | None) -> int:
    """Tune for the GPU of this machine -> exit code: 2 without a GPU."""
    try:
        machine = CudaMachine()
    except NoGPUError as error:
        print(f"cast-kernels tune: {error}; this command measures, so it needs a GPU", file=sys.stderr)
        return NO_GPU
    return tune(machine, architecture(), write)


def tune(machine: Machine, arch: str, write: Path | None) -> int:
    """Tune every problem, print its trials, print and write the entries -> exit code: 1 if a table's entry is wrong."""
    entries, failed = [], False
    name = machine.describe()["name"]
    for dtype, d in PROBLEMS:
        bits, start = dtype.itemsize * 8, tiles.find_set(arch, dtype.itemsize * 8, d)
        try:
            best, ms, trials = search(start, measured(machine, dtype, Case(batch=1, bottleneck=d), arch))
        except RefusedError as error:
            print(f"{arch}, {bits} bits, d={d}: FAIL, the table's own entry: {error}")
            failed = True
            continue
        except UnusableError as error:
            print(f"{arch}, {bits} bits, d={d}: FAIL, a kernel faulted: {error}")
            failed = True
            break
        for trial in trials:
            print(f"  {trial.part} {trial.tile}: {trial.reason if trial.ms is None else f'{trial.ms:.3f} ms'}")
        source = (
            f"measured on {name}: {ms:.3f} ms a training step of {_BATCH} clips, torch {torch.__version__}; "
            f"not tuned: {', '.join(NOT_TUNED)}"
        )
        entries.append(as_python(arch, bits, d, replace(best, source=source)))
        print(entries[-1])
    if write is not None:
        write.write_text("\n".join(entries) + "\n")
    return 1 if failed else 0
