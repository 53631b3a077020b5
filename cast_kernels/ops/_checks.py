"""Argument checks that all ops share. Messages name the given value, the allowed ones, and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on the tensor's device, or None outside of autocast."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_tensors(tensors: Mapping[str, object]) -> None:
    """Raise TypeError for the first that is no tensor; the message names its type and a remedy."""
    for name, x in tensors.items():
        if isinstance(x, Tensor):
            continue
        kind = "None" if x is None else f"a {type(x).__module__}.{type(x).__qualname__}".replace(" builtins.", " ")
        convert = "torch.from_numpy makes one" if hasattr(x, "__array__") else "torch.as_tensor makes one of numbers"
        raise TypeError(f"{name} is {kind}; it must be a torch.Tensor{'' if x is None else f' ({convert})'}")


def check_parameters(parameters: object, expected: type, owner: str = "") -> None:
    """Raise TypeError unless these are an op's parameters, and each field a tensor, more parameters, or None."""
    name = owner.removesuffix(".") or "parameters"
    if not isinstance(parameters, expected):
        raise TypeError(f"{name} is a {type(parameters).__qualname__}; it must be a cast_kernels.{expected.__name__}")
    fields: Mapping[str, object] = parameters._asdict()  # type: ignore[attr-defined]
    check_tensors({f"{owner}{field}": x for field, x in fields.items() if x is not None})


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor is there and has this shape."""
    if tensor is None:
        raise ValueError(f"{name} is missing; it must be a tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with these streams it must be {shape}")


def check_kinds(streams: Mapping[str, Tensor], parameters: Iterable[Tensor | None], autocast: bool) -> None:
    """One device, one floating dtype. Under autocast the floating dtypes may differ, as for PyTorch's operators.

    Raises:
        ValueError: several devices.
        TypeError: a dtype that is not floating, or several of them outside of autocast.
    """
    tensors = [*streams.values(), *(p for p in parameters if p is not None)]
    devices = sorted({str(x.device) for x in tensors})
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {' and '.join(devices)}; all streams and parameters must be on one device")
    dtypes = sorted({str(x.dtype) for x in tensors})
    if not all(x.is_floating_point() for x in tensors):
        raise TypeError(f"dtypes are {', '.join(dtypes)}; streams and parameters must be floating point")
    if not autocast and len(dtypes) > 1:
        own = ", ".join(f"{name} {x.dtype}" for name, x in streams.items())
        raise TypeError(
            f"dtypes are mixed: {own}, all tensors {', '.join(dtypes)}; "
            "convert them to one (module.to(dtype)), or run under torch.autocast"
        )


def check_width(name: str, weight: Tensor | None, dim: int) -> int:
    """Outputs of a linear layer that reads a stream of `dim` channels, or ValueError."""
    if weight is None or weight.ndim != 2 or weight.shape[0] < 1:
        came = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
        raise ValueError(f"{name} is {came}; it must be [width, D] = (at least 1, {dim})")
    check_shape(name, weight, (weight.shape[0], dim))
    return weight.shape[0]


def check_adapter(adapter: Mapping[str, Tensor | None], dim: int) -> None:
    """The adapter's four tensors, in the order down_weight, down_bias, up_weight, up_bias, fit or are all None.

    Raises:
        ValueError: some are missing, or a shape does not fit.
    """
    absent = [name for name, tensor in adapter.items() if tensor is None]
    if len(absent) == len(adapter):
        return
    if absent:
        raise ValueError(f"{' and '.join(absent)} missing; give all four adapter tensors, or none of them")
    first, *others = adapter
    width = check_width(first, adapter[first], dim)
    for name, shape in zip(others, ((width,), (dim, width), (dim,)), strict=True):
        check_shape(name, adapter[name], shape)


def check_row_scale(scale: Tensor | None, x: Tensor) -> None:
    """Drop-path factors can be broadcast to x.shape[:-1].

    Raises:
        ValueError: a shape that cannot be broadcast, another device, or factors that require a gradient.
        TypeError: no tensor, or a dtype that is not floating.
    """
    if scale is None:
        return
    check_tensors({"row_scale": scale})
    lead = x.shape[:-1]
    fits = scale.ndim <= len(lead)
    if not fits or any(s not in (1, n) for s, n in zip(reversed(scale.shape), reversed(lead), strict=False)):
        raise ValueError(f"row_scale has shape {tuple(scale.shape)}; it must be broadcastable to {tuple(lead)}")
    if not scale.is_floating_point():
        raise TypeError(f"row_scale is {scale.dtype}; it must be floating point")
    if scale.device != x.device:
        raise ValueError(f"row_scale lies on {scale.device}, x on {x.device}; move it there")
    if scale.requires_grad:
        raise ValueError("row_scale requires a gradient, but drop-path factors are constants; pass row_scale.detach()")


def spread_row_scale(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """Checked drop-path factors in the shape of x.shape[:-1] and the stream's dtype."""
    return None if scale is None else scale.expand(x.shape[:-1]).to(x.dtype)
