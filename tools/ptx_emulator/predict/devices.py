"""The GPUs whose speed is predicted, and the source of each constant.

A constant that is marked as an assumption was neither measured by us nor found in a vendor's document. A prediction
that uses it is no more reliable than that assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptx_emulator.targets import TARGETS, Target


class Constant(float):
    """A number of a device with its unit, its source, and whether it is an assumption."""

    unit: str
    source: str
    assumed: bool

    def __new__(cls, value: float, unit: str, source: str, assumed: bool = False) -> Constant:
        made = super().__new__(cls, value)
        made.unit, made.source, made.assumed = unit, source, assumed
        return made


@dataclass(frozen=True)
class Device:
    """One GPU. Tensor rates are for 16-bit operands; tf32 runs at half of them."""

    name: str
    target: Target
    clock: Constant
    tensor: Mapping[str, Constant]  # instruction in PTX -> FLOP per clock and multiprocessor
    efficiency: Constant
    l2: Constant
    dram: Constant

    @property
    def peak(self) -> float:
        """FLOP/s that the best tensor instruction can reach."""
        return max(self.tensor.values()) * self.efficiency * self.clock * self.target.processors


_MMA_HOPPER = Constant(
    2731, "FLOP/clk/SM",
    "FlashGPU-Sim's SM90_H100 configuration: m16n8k16 every 6 clocks on each quarter, 2/3 of wgmma",
)  # fmt: skip
_WGMMA = Constant(4096, "FLOP/clk/SM", "NVIDIA H100 data sheet: 989 TFLOP/s dense bf16 at 132 SMs and 1.83 GHz")
_HOPPER = {"mma": _MMA_HOPPER, "wgmma": _WGMMA}
_HOPPER_CLOCK = Constant(1.60e9, "Hz", "sustained under tensor load; boost is 1.98 GHz", assumed=True)
_L2_HOPPER = Constant(5.5e12, "B/s", "about 70 % of the nominal 7.7 TB/s at 1.5 GHz", assumed=True)

DEVICES: dict[str, Device] = {
    "A100": Device(
        "A100", TARGETS["sm_80"],
        Constant(1.41e9, "Hz", "NVIDIA A100 data sheet: boost clock; assumed to hold under load", assumed=True),
        {"mma": Constant(2048, "FLOP/clk/SM", "NVIDIA A100 white paper: 312 TFLOP/s dense bf16 at 108 SMs, 1.41 GHz")},
        Constant(0.90, "of the tensor rate", "what good GEMMs reach", assumed=True),
        Constant(4.0e12, "B/s", "nominal 5120 B/clk is 7.2 TB/s; about 55 % of it", assumed=True),
        Constant(1.7e12, "B/s", "about 85 % of the 40 GB and 80 GB cards' 1.56 to 2.04 TB/s", assumed=True),
    ),
    "H100": Device(
        "H100", TARGETS["sm_90"], _HOPPER_CLOCK, _HOPPER,
        Constant(0.92, "of the tensor rate", "gives the 798 TFLOP/s that an 8192^3 bf16 GEMM was measured at"),
        _L2_HOPPER, Constant(3.0e12, "B/s", "copy bandwidth measured on an H100 80GB HBM3"),
    ),
    "H200": Device(
        "H200", TARGETS["sm_90"], _HOPPER_CLOCK, _HOPPER,
        Constant(0.90, "of the tensor rate", "gives the 770 to 798 TFLOP/s that 8192^3 bf16 GEMMs were measured at"),
        _L2_HOPPER, Constant(4.3e12, "B/s", "copy bandwidth measured on an H200"),
    ),
}  # fmt: skip


def device(name: str) -> Device:
    """The device of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}; allowed: {', '.join(DEVICES)}")
    return DEVICES[name]
