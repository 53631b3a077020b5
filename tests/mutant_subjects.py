"""The launches in which `ptx_mutants.py` plants faults: small, with outputs of NaN, each compiled anew."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import test_ptx_cuda
import torch
from kernel_cache import offline
from ptx_emulator.core.formats import bf16_to_f32, f32_to_bf16
from ptx_emulator.cuda import Given, Pointer, Record, Tiled
from ptx_emulator.mutants import Subject
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Argument, Launch
from ptx_emulator.triton.launcher import Emulator, Span, memory_of, spans

from cast_kernels.evidence.cases import Case, poisoned_memory, run

BOX = 64 * 128
SPLIT_SHARED = 2 * 3 * BOX + 16 * 128 * 16 + 64 * 4 + 24


def _compiled(file: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return test_ptx_cuda.compiled((test_ptx_cuda.SOURCE.parent / file).read_text(), Path(folder))


def gemm() -> Subject:
    """`cuda/gemm.cu`, three stages and two tiles a CTA."""
    record, _ = test_ptx_cuda.launch_of(_compiled("gemm.cu"))
    return Subject("gemm.cu", record, {"c": "bf16"})


def split_launch(ptx: str) -> tuple[Record, dict[str, np.ndarray]]:
    """(a launch of `cuda/split.cu` on 312 rows, the exact outputs): five steps, the last one in part."""
    rows = 312
    random = np.random.default_rng(0)
    g, x = (f32_to_bf16(random.standard_normal((rows, n)).astype(np.float32)) for n in (64, 128))
    w, bias = np.full((64, 128), np.nan, np.float32), np.full(64, np.nan, np.float32)
    maps = [
        Tiled(Pointer(name), "bf16", a.shape[::-1], (2 * a.shape[1],), (64, 64), 128)
        for name, a in (("g", g), ("x", x))
    ]
    arguments = (*maps, Pointer("w"), Pointer("b"), -(-rows // 64))
    buffers = {"g": g, "x": x, "w": w, "b": bias}
    record = Record(ptx, "split", (2, 1, 1), (128, 1, 1), arguments, buffers, SPLIT_SHARED)
    left = bf16_to_f32(g).astype(np.float64)
    return record, {"w": left.T @ bf16_to_f32(x).astype(np.float64), "b": left.sum(0)}


def split() -> Subject:
    """`cuda/split.cu`."""
    record, _ = split_launch(_compiled("split.cu"))
    return Subject("split.cu", record, {"w": "", "b": ""})


def gluon() -> Subject:
    """`gluon_kernels.product`: four steps, maps made in the kernel."""
    import test_ptx_gluon

    record, _ = test_ptx_gluon.launch_of()
    return Subject("gluon_kernels.py", record, {"y": "bf16"})


class Recording(Emulator):
    """Keeps the first launch of each kernel as a subject."""

    def __init__(self) -> None:
        super().__init__()
        self.subjects: dict[str, Subject] = {}

    def launch(self, launch: Launch) -> None:
        if launch.kernel in self.subjects:
            super().launch(launch)
            return
        record = _record(launch)
        super().launch(launch)
        after = _buffers(launch.arguments)
        changed = [name for name, array in record.buffers.items() if array.tobytes() != after[name].tobytes()]
        outputs = {name: "bf16" if after[name].dtype == np.uint16 else "" for name in changed}
        self.subjects[launch.kernel] = Subject(f"{launch.kernel}, {launch.target.name}", record, outputs)


def _front(span: Span) -> int:
    return (span.start - span.block) % 256


def _buffers(arguments: Sequence[Argument]) -> dict[str, np.ndarray]:
    """Copies of the memory that the arguments view, a buffer for each stretch of it.

    Zeros stand in front of one that does not begin at a multiple of 256 bytes of its block, so that it does so again.
    """
    kinds = {argument.name: argument.type for argument in arguments}
    found = {}
    for span in spans(arguments):
        held = np.uint16 if all(kinds[name] == "*bf16" for name in span.names) else np.float32
        front = np.zeros(_front(span), np.uint8)
        found["+".join(span.names)] = np.concatenate([front, memory_of(span)]).view(held)
    return found


def _record(launch: Launch) -> Record:
    """A launch that is about to happen."""
    places = {}
    for span in spans(launch.arguments):
        for argument in launch.arguments:
            if argument.name in span.names:
                places[argument.name] = Pointer(
                    "+".join(span.names), _front(span) + argument.value.data_ptr() - span.start
                )
    arguments: list[Given] = [places.get(argument.name, argument.value) for argument in launch.arguments]
    return Record(
        launch.asm["ptx"], launch.kernel, launch.grid, (launch.threads, 1, 1), tuple(arguments),
        _buffers(launch.arguments), launch.metadata.shared, target=launch.target.name,
    )  # fmt: skip


@cache
def forward(goal: str) -> dict[str, Subject]:
    """The kernels of B-CAST's forward as the library launches them, in bf16, by name."""
    emulator = Recording()
    with offline(target(goal), emulator), poisoned_memory():
        run(Case(1, 2, 5, 96, 32, 2, backward=False), "triton", torch.bfloat16)
    return emulator.subjects


#: name -> what makes it
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "gemm.cu": gemm,
    "split.cu": split,
    "gluon_kernels.py": gluon,
    "project, sm_80": lambda: forward("sm_80")["project"],
    "project, sm_90": lambda: forward("sm_90")["project"],
}
#: those that nvcc compiles
NEED_NVCC = ("gemm.cu", "split.cu")
