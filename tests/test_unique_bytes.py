"""The bytes that a prediction counts of a launch are those that the launch touches when it is executed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_emulator import Memory
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, offline_driver
from ptx_emulator.triton.launcher import Emulator

from cast_kernels.evidence import model
from cast_kernels.evidence.cases import Case, poisoned_memory, run

Accesses = dict[int, list[np.ndarray]]  # bytes of an access -> where it began

#: Kernels that name a tensor which this problem never makes them touch.
NAMED_ONLY = ("project_backward", "weight_gradient")


class Touching(Emulator):
    """Emulator that keeps, of each launch, (kernel, bytes touched, bytes counted)."""

    def __init__(self, accesses: Accesses) -> None:
        super().__init__(engine="interpreter")  # which asks `Memory.check` about each access
        self.accesses, self.seen = accesses, list[tuple[str, int, int]]()

    def launch(self, launch: Launch) -> None:
        self.accesses.clear()
        super().launch(launch)
        touched = [
            np.unique(np.concatenate(starts)) + byte for size, starts in self.accesses.items() for byte in range(size)
        ]
        self.seen.append((launch.kernel, len(np.unique(np.concatenate(touched))), model.unique_bytes(launch)))


def test_a_launch_touches_the_bytes_that_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parameters that the compiler dropped are not counted: o, the streams of exchange_backward."""
    accesses: Accesses = {}
    own = Memory.check

    def check(memory: Memory, offsets: np.ndarray, size: int, align: int, text: str) -> None:
        own(memory, offsets, size, align, text)
        accesses.setdefault(size, []).append(np.unique(offsets))

    monkeypatch.setattr(Memory, "check", check)
    with offline_driver(target("sm_80"), Touching(accesses), tmp_path) as kept, poisoned_memory():
        run(Case(1, 2, 16, 64, 32, 2), "triton", torch.bfloat16)
    assert {"project", "exchange", "exchange_backward", "attention_backward"} <= {kernel for kernel, _, _ in kept.seen}
    assert [row for row in kept.seen if row[1] > row[2]] == []
    assert [row for row in kept.seen if row[1] != row[2] and row[0] not in NAMED_ONLY] == []
