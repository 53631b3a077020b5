"""PyTorch's transforms of backend `triton`, interpreted: what works is right, what does not is refused."""

from __future__ import annotations

import pytest
import torch
from derivative_cases import CALLS
from torch.func import grad, jvp, vmap

ops = pytest.mark.parametrize("op", ["bcast", "ffn", "adapter"])


@ops
def test_what_has_no_kernel_is_refused(op: str) -> None:
    f, xs = CALLS[op].loss("triton"), [x.requires_grad_() for x in CALLS[op].tensors(torch.float32)]
    first = torch.autograd.grad(f(*xs), xs, create_graph=True)[-2]
    with pytest.raises(NotImplementedError, match=f"cast_kernels::{op} cannot be differentiated twice"):
        first.square().sum().backward()
    with pytest.raises(NotImplementedError, match=f"cast_kernels::{op} has no forward-mode derivative"):
        jvp(lambda x: f(x, *xs[1:]), (xs[0],), (xs[0],))


@ops
def test_gradients_in_func_and_per_sample(op: str) -> None:
    f, tensors = CALLS[op].loss("triton"), CALLS[op].tensors(torch.float32)
    xs = [x.clone().requires_grad_() for x in tensors]
    want = torch.autograd.grad(f(*xs), xs)
    numbers = tuple(range(len(xs)))
    assert all(torch.equal(x, y) for x, y in zip(grad(f, numbers)(*tensors), want, strict=True))
    stacked = torch.stack((tensors[0], tensors[0] * 0.5))
    rows = vmap(grad(lambda x: f(x, *tensors[1:])))(stacked)
    assert torch.equal(rows[0], want[0])
    assert not torch.equal(rows[1], want[0])
