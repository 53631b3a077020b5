"""A picture of B-CAST's bytes: moved in forward and backward, and kept between them.

Our counts are those of the committed predictions: for each launch, each byte of its tensors once. Eager's counts are
the bytes that each operator reads and writes, traced on tensors without memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from baselines import published
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

import cast_kernels
from cast_kernels.evidence.eager_model import Ledger
from cast_kernels.triton import bcast as triton_bcast
from website.svg import FAINT, Picture

PREDICTIONS = Path(__file__).resolve().parents[2] / "benchmarks/predictions/bf16"
CLIPS = 6
_THEIRS, _OURS = "#adb5bd", "#1971c2"
_WIDTH, _LEFT, _BARS = 420, 156, 190

_Run = Callable[[cast_kernels.BCAST, Tensor, Tensor], tuple[Tensor, Tensor]]
_Shapes = tuple[tuple[int, ...], tuple[int, ...]]
#: What runs, and its layouts of the streams.
_EAGER: dict[str, tuple[_Run, _Shapes]] = {
    "eager, published code": (published, ((197, CLIPS * 8, 768), (CLIPS, 8 * 196, 768))),
    "eager, tuned": (cast_kernels.BCAST.forward, ((CLIPS, 8, 197, 768), (CLIPS, 8, 196, 768))),
}


@dataclass(frozen=True)
class Row:
    """Bytes that one way to run B-CAST moves and keeps."""

    name: str
    forward: float
    backward: float
    kept: float


@cache
def rows() -> list[Row]:
    """The published code, PyTorch's best, and ours at every level; the paper's size, bfloat16."""
    found = [_eager(name, *run) for name, run in _EAGER.items()]
    for level in cast_kernels.Recompute:
        told = json.loads((PREDICTIONS / level / "h100.json").read_text())
        (batch,) = (entry for entry in told["devices"]["H100"]["batches"] if entry["batch"] == CLIPS)
        moved = {
            phase: sum(launch["dram_bytes"] for launch in batch["launches"][phase]) for phase in ("forward", "backward")
        }
        kept = triton_bcast.saved_words(_problem(), level.value) * 4 * CLIPS
        found.append(Row(f"ours, {level}", moved["forward"], moved["backward"], kept))
    return found


def _problem() -> cast_kernels.Problem:
    return cast_kernels.Problem(CLIPS, 8, 196, 768, 384, 12, "time", "space", torch.bfloat16, "cuda")


def _eager(name: str, run: _Run, shapes: _Shapes) -> Row:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, streams = _posed("cpu", shapes)
        with Ledger() as forward:
            outputs = run(module, *streams)
        gradients = [torch.empty_like(x) for x in outputs]
        with Ledger() as backward:
            torch.autograd.grad(outputs, (*streams, *module.parameters()), gradients)
    moved = [sum(operation.bytes for operation in ledger.operations) for ledger in (forward, backward)]
    return Row(name, *moved, _kept(run, shapes))


def _kept(run: _Run, shapes: _Shapes) -> int:
    """Bytes that autograd keeps on a GPU, without the streams and the parameters."""
    kept: dict[StorageWeakRef, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return x

    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash)
    with FakeTensorMode(allow_non_fake_inputs=True), attention:
        module, streams = _posed("cuda", shapes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run(module, *streams)
        given = {StorageWeakRef(x.untyped_storage()) for x in (*streams, *module.parameters())}
        return sum(size for storage, size in kept.items() if storage not in given)


def _posed(device: str, shapes: _Shapes) -> tuple[cast_kernels.BCAST, list[Tensor]]:
    """The module and its streams without memory, for a context of fake tensors."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = cast_kernels.BCAST(backend="eager").to(torch.bfloat16)
    streams = [torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
    return module.to_empty(device=device), streams


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention that PyTorch chooses on a GPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def draw() -> str:
    """The picture as SVG."""
    counted = rows()
    most = max(max(row.forward, row.backward) for row in counted)
    picture = Picture(_WIDTH, 412, "Bytes that B-CAST moves and keeps")
    picture.words(12, 22, "Where B-CAST's bytes go", size=15, style="font-weight='600'")
    picture.words(12, 40, f"{CLIPS} clips, bfloat16; counted, not measured", FAINT)
    y = 64
    for what, title in (
        ("forward", "Forward reads and writes"),
        ("kept", "Kept for backward, besides streams and weights"),
        ("backward", "Backward reads and writes"),
    ):
        picture.words(12, y, title, style="font-weight='600'")
        for row in counted:
            y += 18
            value = getattr(row, what)
            picture.words(_LEFT - 6, y + 2, row.name, size=12, style="text-anchor='end'")
            picture.box(
                _LEFT, y - 8, max(1, _BARS * value / most), 12, _OURS if row.name.startswith("ours") else _THEIRS
            )
            picture.words(_LEFT + _BARS * value / most + 5, y + 2, f"{value / 1e6:,.0f} MB", size=12)
        y += 30
    return picture.text()
