"""The registered operators under PyTorch's transforms, for all ops: one kernel for autograd, one rule for vmap.

Reverse mode works once, also inside `torch.func` and under `vmap`. A second derivative and forward mode are refused;
without the refusal PyTorch would return zeros for both.

The kernel replaces `torch.library.register_autograd`. The node of that function refuses `torch.func.grad`, drops
tangents in silence, and gives backward a gradient of zeros for every unused output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves, tree_map

#: PyTorch's namespace of our operators: the package's own name. A copy of the package under another name can be loaded
#: beside it.
NAMESPACE = __name__.partition(".")[0]

_REMEDY = (
    "PyTorch's own operators have this derivative: build the model with fused=False, attention='math' (CAST, experts, "
    "VideoMAE, baselines), or call CAST's model.unfuse(attention='math'); of cast_kernels' functions and of BCAST, ask "
    "for backend='eager', and for attention='math' where they take it"
)


def may_be_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward may follow a call on these tensors. Inside `torch.func` tensors do not tell, so the answer is
    yes."""
    if not torch.is_grad_enabled():
        return False
    return torch._C._are_functorch_transforms_active() or any(x is not None and x.requires_grad for x in tensors)


def register(library: Any, name: str, differentiate: Callable[..., Any]) -> None:
    """Teach PyTorch the derivative of `cast_kernels::<name>`, and `vmap` of it and of `<name>_backward`.

    Args:
        library: defines both operators.
        name: of the forward operator.
        differentiate: (run, inputs) -> the result of `run(*inputs)`, as a node of autograd's graph. `run` is the
            operator below autograd, `inputs` its arguments.
    """

    def refuse(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
        found = _Refusal.apply(name, lambda: run(*inputs), *tree_leaves(inputs))  # type: ignore[attr-defined]
        return list(found)

    own = f"{name}_backward"
    library.impl(name, _kernel(name, name, differentiate), "Autograd", with_keyset=True)
    library.impl(own, _kernel(own, name, refuse), "Autograd", with_keyset=True)
    for operator in (name, own):
        torch.library.register_vmap(f"{NAMESPACE}::{operator}", _loop(operator), lib=library)
        library.impl(operator, _refuse_legacy_vmap(name), "Batched")


def refuse_tangents(name: str) -> NoReturn:
    """Say that the op has no derivative in forward mode."""
    raise NotImplementedError(
        f"{NAMESPACE}::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize, "
        f"torch.autograd.forward_ad): fused kernels have first derivatives in reverse mode only. {_REMEDY}"
    )


def below_autograd(run: Callable[[], Any]) -> Any:
    """The result of `run()`, called in a node's forward.

    A node's forward turns gradients off. Outer transforms differentiate as well, so for them both modes are on again.
    """
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run()
    return run()


class _Refusal(_SingleLevelFunction):
    """A backward operator's call in autograd's graph, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Any], *_: Any) -> tuple[Tensor, ...]:
        ctx.name = name
        ctx.set_materialize_grads(False)
        return tuple(below_autograd(run))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        raise NotImplementedError(
            f"{NAMESPACE}::{ctx.name} cannot be differentiated twice (double backward, as gradient penalties and "
            f"Hessians need it): fused kernels have first derivatives only. {_REMEDY}"
        )


def _kernel(
    operator: str, name: str, differentiate: Callable[[Callable[..., Any], tuple[Any, ...]], Any]
) -> Callable[..., Any]:
    """The function that the dispatcher calls for autograd; `name` is the forward operator's, for messages."""
    overload = getattr(getattr(torch.ops, NAMESPACE), operator).default

    def kernel(keyset: Any, *inputs: Any) -> Any:
        def run(*below: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *below)

        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            refuse_tangents(name)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return run(*inputs)
        with enable_single_level_autograd_function():
            return differentiate(run, inputs)

    return kernel


def _loop(operator: str) -> Callable[..., Any]:
    """The rule for `vmap`: one call for each entry of the mapped dimension. An entry has many tokens, enough to fill
    the cores."""

    def rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError(f"vmap over a dimension of size 0 calls {NAMESPACE}::{operator} never; map over 1 or more")

        def entry(index: int) -> Any:
            return tree_map(lambda x, dim: x if dim is None else x.select(dim, index), inputs, in_dims)

        run = getattr(getattr(torch.ops, NAMESPACE), operator)
        outputs = tree_map(lambda *xs: torch.stack(xs), *(run(*entry(index)) for index in range(info.batch_size)))
        return outputs, tree_map(lambda _: 0, outputs)

    return rule


def _refuse_legacy_vmap(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no rule for the vmap of torch.autograd.grad(..., is_grads_batched=True) and "
            "torch.autograd.functional.jacobian(..., vectorize=True). Use torch.func.jacrev, or torch.vmap of the "
            "function that torch.func.vjp returns, or a loop over the gradients"
        )

    return refuse
