"""A machine for tests: tensors on the CPU, times from a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from cast_kernels.gpu.machine import Step


class FakeMachine:
    """Runs steps on the CPU. Times come from `clock`, called at each measurement; a log says what was asked."""

    stand_in = ""

    def __init__(self, clock: Callable[[], float] | None = None, can_capture: bool = True) -> None:
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self.can_capture = can_capture
        self.findings: dict[str, tuple[bool, str]] = {}
        self._count: Iterator[float] = iter(float(i) for i in range(1, 1 << 20))
        self._clock = clock or (lambda: next(self._count))

    def describe(self) -> dict[str, Any]:
        return {"name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132}

    def elapsed_ms(self, step: Step, repeats: int = 1) -> float:
        self.log.append("time")
        for _ in range(repeats):
            step()
        return self._clock()

    def computed(self) -> bool:
        return True

    def graph_pool(self) -> Any:
        return None

    def synchronise(self) -> None:
        self.log.append("wait")

    def free(self) -> None:
        self.log.append("free")

    def flush_cache(self) -> None:
        self.log.append("flush")

    def peak_bytes(self, step: Step) -> int:
        step()
        return 3_000_000

    def capture(self, step: Step, pool: Any = None) -> Step:
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: self.log.append("replay")

    def sanitize(self, tool: str, code: str, seconds: float = 0.0) -> tuple[bool, str] | None:
        compile(code, tool, "exec")
        return self.findings.get(tool)
