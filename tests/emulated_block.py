"""A training step of one CAST-B block at its full width whose kernels run from compiled GPU code; what it erred.

    python tests/emulated_block.py             # both architectures, bf16 under autocast and bf16 throughout
    python tests/emulated_block.py sm_90 amp   # that one; the rows of others stay

Writes benchmarks/evidence/block.json, a row a run. Exit status 1 after a fault or an error above the gate.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cast_models import randomise
from heavy import circumstances
from kernel_cache import offline
from ptx_emulator.targets import EMULATED, target
from ptx_emulator.triton.launcher import EmulationFault, Emulator, KernelRuns
from torch import Tensor

from cast.model import TRAINABLE
from cast.model.block import CASTBlock
from cast.model.config import CASTConfig
from cast.model.layers import Running
from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.cases import KINDS, Error, Kind, compare, poisoned_memory

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/evidence/block.json"
#: CAST-B's last block, the one with the highest rate of drop-path.
PUBLISHED, INDEX = CASTConfig(drop_path=0.5), 11
DTYPES = ("amp", "bf16")


@dataclass
class Step:
    """One step in emulation: what it erred, what ran, or the fault that ended it."""

    errors: list[Error]
    kernels: dict[str, KernelRuns]
    seconds: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault and all(error.ok for error in self.errors)


@contextmanager
def drawn_alternately() -> Iterator[None]:
    """Drop-path factors of 2 and 0 in turn, which every dtype holds, the same in each run: the draw is no subject."""

    def drawn(shape: tuple[int, ...], rate: float, like: Tensor) -> Tensor:
        assert rate == 0.5
        return 2.0 * (torch.arange(shape[0], device=like.device) % 2 == 0).to(like.dtype)

    with mock.patch("cast.model.block.drop_factor", drawn):
        yield


def block_of(config: CASTConfig, index: int, kind: Kind) -> CASTBlock:
    """The block with every parameter random, trained as a CAST is: the experts' own weights are frozen."""
    block = CASTBlock(config, index, Running("triton"))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(TRAINABLE.search(name) is not None)
    randomise(block, 3).to(kind.dtype).train()
    return block


def train_step(block: CASTBlock, config: CASTConfig, batch: int, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Outputs, every gradient, and what AdamW did to the parameters, in float64."""
    dtype, generator = block.clip_ln_1.weight.dtype, torch.Generator().manual_seed(5)
    shape = (batch, config.exchange_frames, config.num_patches, config.embed_dim)
    shapes = {"spatial": (*shape[:2], 1 + shape[2], shape[3]), "temporal": shape}

    def drawn(name: str) -> Tensor:
        """Of bfloat16 numbers, which are the same in each dtype."""
        return torch.randn(shapes[name], generator=generator).bfloat16().to(dtype)

    inputs = {name: drawn(name).requires_grad_() for name in shapes}
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    before = {name: p.detach().double().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    with cuda_rules(autocast):
        outputs = dict(zip(shapes, block(*inputs.values()), strict=True))
    torch.autograd.backward(tuple(outputs.values()), [drawn(name) for name in outputs])
    optimizer.step()
    result = dict(outputs)
    result |= {f"grad.{name}": x.grad for name, x in (inputs | trained).items() if x.grad is not None}
    result["update"] = torch.cat([(p.detach().double() - before[name]).flatten() for name, p in trained.items()])
    return {name: x.detach().double() for name, x in result.items()}


def emulated_step(
    name: str, dtype: str, engine: str, config: CASTConfig = PUBLISHED, index: int = INDEX, batch: int = 1
) -> Step:
    """Run the step in float64, by eager, and from compiled code.

    Args:
        name: of the target.
        dtype: a key of `KINDS`.
        engine: of the emulator.
        config: of the model that the block is from.
        index: which of its blocks.
        batch: clips.
    """
    kind = KINDS[dtype]
    block = block_of(config, index, kind)
    eager, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    eager.backend = exact.backend = "eager"
    emulator, errors, fault = Emulator(engine=engine), [], ""
    with drawn_alternately():
        truth = train_step(exact, config, batch, None)
        theirs = train_step(eager, config, batch, kind.autocast)
        begin = time.perf_counter()
        try:
            with offline(target(name), emulator), poisoned_memory():
                errors = compare(train_step(block, config, batch, kind.autocast), theirs, truth)
        except EmulationFault as error:
            fault = str(error)
    return Step(errors, emulator.runs, time.perf_counter() - begin, fault)


def row_of(name: str, dtype: str, engine: str, step: Step) -> dict[str, Any]:
    """What is kept of a step. A tensor: root mean square error, eager's, largest error, eager's."""
    kernels = {
        runs.kernel: {
            "launches": runs.launches, "ctas": runs.ctas, "seconds": round(runs.seconds, 2),
            "warp_instructions": runs.counters["warp_instructions"], "native": round(runs.native, 4),
        }
        for runs in step.kernels.values()
    }  # fmt: skip
    return {
        "target": name, "dtype": dtype, "engine": engine, "ok": step.ok, "fault": step.fault,
        "worst ratio": max((error.ratio for error in step.errors), default=None),
        "seconds": round(step.seconds, 1), **circumstances(), "kernels": kernels,
        "errors": {e.name: [e.rms, e.eager_rms, e.worst, e.eager_worst] for e in step.errors},
    }  # fmt: skip


def main(words: Sequence[str]) -> int:
    """Run those whose target and dtype are what the words name, print a line each, and keep the rows."""
    named = [(name, dtype) for name in EMULATED for dtype in DTYPES]
    if strange := [word for word in words if word not in (*EMULATED, *DTYPES)]:
        raise SystemExit(f"{strange[0]} is none of {', '.join((*EMULATED, *DTYPES))}")
    kept = {(row["target"], row["dtype"]): row for row in json.loads(RESULTS.read_text())}
    asked = [both for both in named if set(words) <= set(both)]
    for name, dtype in asked:
        step = emulated_step(name, dtype, "native")
        kept[name, dtype] = row_of(name, dtype, "native", step)
        worst = max(step.errors, key=lambda error: error.ratio, default=None)
        said = f"worst ratio {worst.ratio:.2f} {worst.name}" if worst else step.fault
        print(f"{name} {dtype}: {len(step.errors)} tensors, {said}, {step.seconds:.0f} s", flush=True)
        lines = ",\n".join(json.dumps(kept[both]) for both in named if both in kept)
        RESULTS.write_text(f"[\n{lines}\n]\n")
    return 0 if all(kept[both]["ok"] for both in asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
