"""A model's and an optimizer's tensors by name, whole even if they are sharded.

Under FSDP2 a parameter is a DTensor, and each process has a part of it. Reading makes it whole on every process (a
collective call); writing distributes it again. So a checkpoint does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

#: AdamW's states that have the parameter's shape.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def full(tensor: Tensor) -> Tensor:
    """The tensor, not sharded."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, not sharded."""
    return full(tensor).cpu().contiguous()


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def frozen_names(model: nn.Module) -> set[str]:
    """Parameters that require no gradients."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def read_weights(model: nn.Module, everything: bool) -> dict[str, Tensor]:
    """The state dict, without the frozen parameters unless `everything` is True."""
    left_out = set() if everything else frozen_names(model)
    return {name: whole(tensor) for name, tensor in model.state_dict().items() if name not in left_out}


def write_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of :func:`read_weights` into a model with the same names and shapes."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        put(own[name], tensor)


def read_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `<parameter>:<moment>`."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{key}"] = whole(value)
    return found


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of :func:`read_moments` into an optimizer of the same parameters."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(":")
        parameter = parameters[name]
        value = tensor.to(parameter.device, copy=True)  # the step; fused AdamW keeps it on this device
        if moment in _MOMENTS:
            value = torch.zeros_like(parameter)
            put(value, tensor)
        optimizer.state[parameter][moment] = value


def digest(model: nn.Module, names: Iterable[str]) -> str:
    """The first 16 digits of SHA-256 over names, dtypes, shapes and bytes of these parameters, sorted by name."""
    result, parameters = hashlib.sha256(), dict(model.named_parameters())
    for name in sorted(names):
        tensor = whole(parameters[name])
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()[:16]
