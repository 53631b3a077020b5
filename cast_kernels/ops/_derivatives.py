"""What PyTorch's transforms make of the registered operators, for all ops: one kernel for autograd, one rule for vmap.

Reverse mode works once, also inside `torch.func` and under `vmap`. A second derivative and forward mode are refused:
left to itself, PyTorch returns zeros for both.

The kernel stands in place of `torch.library.register_autograd`, whose node refuses `torch.func.grad`, drops tangents
in silence, and hands backward a gradient of zeros for every output that nobody used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_REMEDY = (
    "PyTorch's own operators have this derivative: build the model with fused=False, attention='math' (CAST, experts, "
    "VideoMAE, baselines), or call CAST's model.unfuse(attention='math'); of cast_kernels' functions and of BCAST, ask "
    "for backend='eager', and for attention='math' where they take it"
)


def may_be_differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether a backward may follow a call on these tensors. Inside `torch.func` a tensor does not say, so it may."""
    if not torch.is_grad_enabled():
        return False
    return torch._C._are_functorch_transforms_active() or any(x.requires_grad for x in tensors)


def register(library: Any, name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Teach PyTorch the derivative of `cast_kernels::<name>`, and `vmap` of it and of `<name>_backward`.

    Args:
        library: that defines both operators.
        name: of the forward operator.
        setup_context: (ctx, inputs, output), as `torch.library.register_autograd` has it; it marks what is kept for
            backward as not differentiable.
        backward: (ctx, *gradients of the outputs, None where nobody used one but never all of them) -> a gradient, or
            None, in the place of each input.
    """

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"cast_kernels::{name} cannot be differentiated twice (double backward, as gradient penalties and "
            f"Hessians need it): fused kernels have first derivatives only. {_REMEDY}"
        )

    library.impl(name, _kernel(name, name, setup_context, backward), "Autograd", with_keyset=True)
    own = f"{name}_backward"
    library.impl(own, _kernel(own, name, lambda ctx, inputs, output: None, refuse), "Autograd", with_keyset=True)
    for operator in (name, own):
        torch.library.register_vmap(f"cast_kernels::{operator}", _loop(operator), lib=library)
        library.impl(operator, _refuse_legacy_vmap(name), "Batched")


def refuse_tangents(name: str) -> NoReturn:
    """Say that the op has no derivative in forward mode."""
    raise NotImplementedError(
        f"cast_kernels::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize, "
        f"torch.autograd.forward_ad): fused kernels have first derivatives in reverse mode only. {_REMEDY}"
    )


class _Node(_SingleLevelFunction):
    """One call in autograd's graph. Tensors travel flat, because autograd finds none inside a list.

    `torch.autograd.Function` would hand the call to `torch.func`, whose dispatcher has brought it here already.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any], spec: Any,
        *flat: Any,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        inputs = tree_unflatten(list(flat), spec)
        if torch._C._are_functorch_transforms_active():
            # A node's forward turns both modes off, but the transforms around this one differentiate as well.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = run(*inputs)
        else:
            output = run(*inputs)
        setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.compute_gradients = backward
        return output if isinstance(output, Tensor) else tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (None,) * 4 + tuple(tree_flatten(ctx.compute_gradients(ctx, *grads))[0])


def _kernel(
    operator: str, name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What the dispatcher calls for autograd; `name` is the forward operator's, for messages."""
    overload = getattr(torch.ops.cast_kernels, operator).default

    def kernel(keyset: Any, *inputs: Any) -> Any:
        def run(*below: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *below)

        flat, spec = tree_flatten(inputs)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            refuse_tangents(name)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return run(*inputs)
        with enable_single_level_autograd_function():
            output = _Node.apply(run, setup_context, backward, spec, *flat)  # type: ignore[attr-defined]
        return list(output) if operator != name else output

    return kernel


def _loop(operator: str) -> Callable[..., Any]:
    """The rule for `vmap`: a call for each entry of the mapped dimension, each with many tokens to fill the cores."""

    def rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError(
                f"vmap over a dimension of size 0 calls cast_kernels::{operator} never; map over 1 or more"
            )

        def entry(index: int) -> Any:
            return tree_map(lambda x, dim: x if dim is None else x.select(dim, index), inputs, in_dims)

        run = getattr(torch.ops.cast_kernels, operator)
        outputs = tree_map(lambda *xs: torch.stack(xs), *(run(*entry(index)) for index in range(info.batch_size)))
        return outputs, tree_map(lambda _: 0, outputs)

    return rule


def _refuse_legacy_vmap(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"cast_kernels::{name} has no rule for the vmap of torch.autograd.grad(..., is_grads_batched=True) and "
            "torch.autograd.functional.jacobian(..., vectorize=True). Use torch.func.jacrev, or torch.vmap of the "
            "function that torch.func.vjp returns, or a loop over the gradients"
        )

    return refuse
