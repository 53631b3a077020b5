"""Corrections to the trace from the emulator: masked lanes, copies of nothing, bank conflicts.

A few CTAs of each compiled kernel are executed once, at the smallest problem of a prediction. The ratio of each counter
to the trace of the same CTAs then corrects the trace of every launch of that kernel, at all sizes.
"""

from __future__ import annotations

from dataclasses import fields

import ptx_emulator
from ptx_emulator.predict.counters import Counters, executed
from ptx_emulator.predict.trace import sample
from ptx_emulator.triton.driver import Launch
from ptx_emulator.triton.launcher import place

from cast_kernels.evidence import trace

#: Executed CTAs of each kernel.
SAMPLES = 4


class Corrections:
    """Ratios of executed to traced counters, by compiled kernel."""

    def __init__(self) -> None:
        self._ratios: dict[str, dict[str, float]] = {}

    def apply(self, launch: Launch, traced: Counters) -> Counters:
        """The trace's counters, corrected to those of an execution."""
        if launch.identity not in self._ratios:
            self._ratios[launch.identity] = self._measure(launch)
        ratios = self._ratios[launch.identity]
        return Counters(traced.tensor_flops, **{name: getattr(traced, name) * ratio for name, ratio in ratios.items()})

    def _measure(self, launch: Launch) -> dict[str, float]:
        ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
        chosen = sample(ctas, SAMPLES)
        memory = ptx_emulator.Memory()
        arguments = place(memory, launch.arguments)
        report = ptx_emulator.launch(
            ptx_emulator.parse(launch.asm["ptx"]).kernels[launch.kernel], grid=launch.grid, threads=launch.threads,
            arguments=arguments, memory=memory, shared_bytes=launch.metadata.shared, target=launch.target.name,
            checks=False, ctas=chosen,
        )  # fmt: skip
        ran = executed(report.counters)
        traced = trace.trace(launch, SAMPLES).times(len(chosen) / ctas)
        if abs(ran.flops - traced.flops) > 1e-6 * traced.flops:
            raise RuntimeError(f"{launch.kernel}: {ran.flops:.0f} FLOP executed, {traced.flops:.0f} traced")
        names = [item.name for item in fields(Counters) if item.name != "tensor_flops"]
        return {name: getattr(ran, name) / getattr(traced, name) if getattr(traced, name) else 1.0 for name in names}
