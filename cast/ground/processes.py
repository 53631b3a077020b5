"""The processes that compute together, and the memory that one of them took."""

from __future__ import annotations

import os
import sys

import torch
from accelerate.state import PartialState


def join_processes() -> PartialState:
    """This process among those that torchrun or accelerate started; without either it is alone.

    Raises:
        ValueError: the launcher's number of processes is not the one that met; they would go on apart.
    """
    state = PartialState(cpu=computes_on_cpu())
    if state.num_processes == 1 and _should_be_several():
        raise ValueError(
            "accelerate launch was asked for several processes, but has started one that knows of no other: give it "
            "--multi_gpu where a machine has a single GPU, take torchrun on CPUs, or ask for one process (and unset "
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
    """accelerate 1.15 starts one process on CPUs, and one a machine where each has one GPU, whatever it is asked for.

    Its command then names the place to meet, as for several, but gives no rank and no number of processes.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def computes_on_cpu() -> bool:
    """accelerate takes gloo for several processes only if it is told that they compute on the CPU."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


def peak_memory(device: torch.device) -> int:
    """Bytes: PyTorch's peak allocation on a GPU since the process began, or the process's peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where only this figure would be missing

    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
