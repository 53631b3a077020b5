"""PyTorch's eager B-CAST for comparison, operation by operation, by the same rules.

An operation that launches a kernel takes the longest of three times: its FLOPs at a share of the tensor peak, its bytes
at a share of DRAM's bandwidth, and a least time. Good library kernels reach these shares. Our kernels get no such
allowance, so the ratio of the two times is an upper bound of the speed-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from ptx_emulator.predict.devices import Constant, Device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import cast_kernels
from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.cases import KINDS, Case

TENSOR_SHARE = Constant(0.65, "of the tensor peak", "library GEMMs of this size", assumed=True)
DRAM_SHARE = Constant(0.80, "of the DRAM bandwidth", "library elementwise kernels", assumed=True)
LEAST = Constant(2.5e-6, "s", "a small kernel of a CUDA graph", assumed=True)

#: Kinds of eager, out of :data:`cast_kernels.evidence.cases.KINDS`.
EAGER = ("bf16", "amp", "amp16")


#: Parts of the names of operators that PyTorch's library computes; all others only move memory.
PRODUCTS = ("mm", "convolution")
ATTENTION = ("scaled_dot_product",)


@dataclass(frozen=True)
class Operation:
    """One kernel that eager launches."""

    name: str
    flops: int
    bytes: int  # read and written

    @property
    def kind(self) -> str:
        """`products`, `attention`, or `elementwise`; a compiler could fuse the last."""
        for kind, words in (("products", PRODUCTS), ("attention", ATTENTION)):
            if any(word in self.name for word in words):
                return kind
        return "elementwise"

    def seconds(self, device: Device) -> float:
        return max(self.flops / (TENSOR_SHARE * device.peak), self.bytes / (DRAM_SHARE * device.dram), LEAST)


@dataclass
class Ledger(TorchDispatchMode):
    """Records every operation that launches a kernel: all except views and allocations."""

    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_made_of_others(func):  # the parts are then seen one by one
            with self:
                return func.decompose(*args, **kwargs)
        out = self.compute(func, args, kwargs)
        if not launches_nothing(func) and func.namespace == "aten":
            moved = sum(x.numel() * x.element_size() for x in (*_read(func, args, kwargs), *_written(func, args, out)))
            flops = _flops(func, args, kwargs, out)
            self.operations.append(Operation(str(func.overloadpacket), flops, moved))
        return out

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator."""
        return func(*args, **kwargs)

    def take(self) -> list[Operation]:
        """The operations since the last call."""
        taken, self.operations = self.operations, []
        return taken


def _is_made_of_others(func: Any) -> bool:
    """Whether an operator has no kernel of its own, such as `matmul` below autograd."""
    if func.namespace != "aten" or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
        return False
    return bool(func._can_decompose())


def _read(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors whose contents the operator reads."""
    only_written = func.overloadpacket.__name__.strip("_") in ("copy", "foreach_copy", "fill", "zero", "bernoulli")
    given = (args[1:] if only_written and func._schema.is_mutable else args, {**kwargs, "out": None})
    return [x for x in tree_leaves(given) if isinstance(x, Tensor)]


def _written(func: Any, args: Any, out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out if func._schema.returns else args[0]) if isinstance(x, Tensor)]


def launches_nothing(func: Any) -> bool:
    """Whether the operation only makes a view or uninitialised memory, or computes on the host."""
    if func.namespace == "cast_kernels":
        return False
    words = ("empty", "_unsafe_view", "detach", "_fused_sdp_choice")
    if func.namespace != "aten" or any(word in func.overloadpacket.__name__ for word in words):
        return True
    returns = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in returns)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def trace(case: Case, kind: str) -> tuple[list[Operation], list[Operation]]:
    """The operations of forward and of backward, on tensors without memory.

    Args:
        case: the problem.
        kind: one of :data:`EAGER`.
    """
    if kind not in EAGER:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(EAGER)}")
    dtype, autocast, streams = KINDS[kind]
    made = cast_kernels.BCAST(
        case.dim, case.bottleneck, case.heads, case.frames, case.patches, case.windows, case.directions,
        case.positions, "eager",
    ).to(dtype)  # fmt: skip
    shape = (case.batch, case.frames, case.patches, case.dim)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stream = streams or dtype
        spatial = torch.empty(shape[0], shape[1], shape[2] + 1, shape[3], dtype=stream, requires_grad=True)
        temporal = torch.empty(shape, dtype=stream, requires_grad=True)
        with Ledger() as forward, cuda_rules(autocast):
            outputs = made(spatial, temporal)
        gradients = [torch.empty_like(x) for x in outputs]
        with Ledger() as backward:
            torch.autograd.grad(outputs, (spatial, temporal, *made.parameters()), gradients)
    return forward.operations, backward.operations


def seconds(operations: list[Operation], device: Device) -> float:
    """The sum of all times, without gaps."""
    return sum(operation.seconds(device) for operation in operations)
