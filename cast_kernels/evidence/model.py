"""The speed model for recorded launches, and the label of every prediction of our kernels."""

from __future__ import annotations

from collections.abc import Sequence

from ptx_emulator.predict import model
from ptx_emulator.predict.counters import Counters
from ptx_emulator.predict.devices import Device
from ptx_emulator.predict.model import Prediction
from ptx_emulator.predict.resources import Resources
from ptx_emulator.predict.trace import used_parameters
from ptx_emulator.triton.driver import Launch
from ptx_emulator.triton.launcher import spans

from cast_kernels.evidence import trace

UNCERTAINTY = 0.40
LABEL = "predicted, unvalidated: no kernel of ours has been timed"


def predict(
    launch: Launch, used: Resources, ctas: Sequence[Counters], code_ratio: float, device: Device
) -> Prediction:  # fmt: skip
    """The least time of a launch.

    Args:
        launch: with its grid and arguments.
        used: resources of its compiled kernel on a multiprocessor.
        ctas: counters of single CTAs; each stands for an equal share of the grid, in its order.
        code_ratio: machine instructions per instruction of PTX.
        device: its target must equal the launch's.

    Raises:
        ValueError: the kernel was compiled for another target.
    """
    if launch.target != device.target:
        raise ValueError(
            f"{launch.kernel} was compiled for {launch.target.name}; {device.name} is {device.target.name}"
        )
    return model.predict(launch.kernel, launch.grid, used, ctas, code_ratio, unique_bytes(launch), device)


def unique_bytes(launch: Launch) -> int:
    """Bytes of the tensors that the kernel uses, each byte once: the least that DRAM must move.

    A tensor that is read and written counts once, because L2 has what a kernel writes and reads back. Parameters that
    the compiler dropped do not count.
    """
    used = used_parameters(trace.kernel_of(launch))
    taken = [argument for position, argument in enumerate(launch.arguments) if position in used]
    return sum(span.stop - span.start for span in spans(taken))
