"""The processes that compute together, and the peak memory of this one."""

from __future__ import annotations

import os
import sys

import torch
from accelerate.state import PartialState


def join_processes() -> PartialState:
    """Join the processes that torchrun or accelerate started; without a launcher this process is alone.

    Raises:
        ValueError: the launcher announced another number of processes than have met; they would train apart.
    """
    state = PartialState(cpu=computes_on_cpu())
    if state.num_processes == 1 and _should_be_several():
        raise ValueError(
            "accelerate launch was asked for several processes, but has started one process alone: give it "
            "--multi_gpu if each machine has a single GPU, take torchrun on CPUs, or ask for one process (and unset "
            "MASTER_ADDR)"
        )
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != wanted:
        raise ValueError(
            f"WORLD_SIZE is {wanted}, but accelerate made a group of {state.num_processes} on {state.device.type}: "
            "start with accelerate launch or torchrun, look at the settings of accelerate config, or unset WORLD_SIZE"
        )
    return state


def _should_be_several() -> bool:
    """Whether accelerate started one process although it was asked for several.

    accelerate 1.15 does so on CPUs, and on machines with one GPU each. It then sets the address of the first process,
    as for several, but no rank and no number of processes.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def computes_on_cpu() -> bool:
    """Whether to compute on the CPU. accelerate takes gloo for several processes only if it is told so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of PyTorch on a GPU since the process began, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows; only this figure is missing there

    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
