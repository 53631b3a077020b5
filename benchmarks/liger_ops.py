"""The operations of liger-kernel that run without a GPU, each beside the same in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


class Op(NamedTuple):
    """One operation."""

    shapes: dict[str, tuple[int, ...]]  # of inputs with a gradient, random normal
    liger: Callable[..., Outputs]
    plain: Callable[..., Outputs]  # the same in PyTorch; its inputs are float64
    fixed: dict[str, Tensor] = {}  # noqa: RUF012  inputs without a gradient
    backward: bool = True  # False: liger's backward requires a GPU


def _f() -> Any:
    from liger_kernel.transformers import functional

    return functional


def _ops() -> Any:
    from liger_kernel import ops

    return ops


def _drawn(*shape: int, high: int = 0, seed: int = 5) -> Tensor:
    """Whole numbers below `high`, or normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator) if high else torch.randn(shape, generator=generator)


def _rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(width // 2) * 2 / width)
    angle = torch.cat((angle, angle), -1)[None]
    return angle.cos().contiguous(), angle.sin().contiguous()


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    middle = ((student.exp() + teacher.exp()) / 2).log()
    terms = teacher.exp() * (teacher - middle) + student.exp() * (student - middle)
    return terms.sum() / 2 / len(student)


def _sparsemax(x: Tensor) -> Tensor:
    ordered, _ = x.sort(-1, descending=True)
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    inside = 1 + count * ordered > ordered.cumsum(-1)
    size = inside.sum(-1, keepdim=True)
    threshold = ((ordered * inside).sum(-1, keepdim=True) - 1) / size
    return (x - threshold).clamp(min=0)


def _neighbours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    far = (place[:, None] - place[None]).abs() > 3
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(far, float("-inf"))
    return scores.softmax(-1) @ v


def _tokens(scores: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = F.conv2d(scores.masked_fill(later, -1e9).softmax(-1), weight, bias, padding=1)
    return mixed.masked_fill(later, 0.0)


def _residuals(blocks: Tensor, query: Tensor, norm: Tensor) -> Tensor:
    weights = ((_rms(blocks) * norm) @ query).softmax(0)
    return (weights[..., None] * blocks).sum(0)


def _llama4(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def one(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    return one(q), one(k)


def _sections(table: Tensor, sections: list[int]) -> Tensor:
    parts = table.split(sections * 2, -1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)[:, None]


def _mrope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (_sections(table, [4, 6, 6]) for table in (cos, sin))
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _grpo(logits: Tensor, ids: Tensor, old: Tensor, ref: Tensor, gain: Tensor) -> Tensor:
    chosen = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    ratio = (chosen - old).exp()
    gain = gain[:, None]
    loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.4) * gain)
    return loss + 0.04 * ((ref - chosen).exp() - (ref - chosen) - 1)


def _grpo_liger(logits: Tensor, ids: Tensor, old: Tensor, ref: Tensor, gain: Tensor) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(logits, old, ref, ids, gain, temperature=0.9, beta=0.04, eps_low=0.2, eps_high=0.4,
                            inplace=False, loss_type="grpo")[0]  # fmt: skip


def _coefficients(x: Tensor, phi: Tensor, b: Tensor, pre: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    scale = torch.cat((pre.expand(4), post.expand(4), res.expand(16)))
    first, second, matrix = (_rms(x.flatten(-2)) @ (phi / 16) * scale + b).split((4, 4, 16), -1)
    matrix = matrix.unflatten(-1, (4, 4)).softmax(-1) + 1e-6
    for axis in (-2, *(-1, -2) * 19):
        matrix = matrix / (matrix.sum(axis, keepdim=True) + 1e-6)
    return first.sigmoid(), 2 * second.sigmoid(), matrix


def _experts(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[0])
        for slot in range(chosen.shape[1]):
            gate, other = (up[chosen[t, slot]] @ x[t]).chunk(2)
            total = total + weight[t, slot] * (down[chosen[t, slot]] @ (F.silu(gate) * other))
        rows.append(total)
    return torch.stack(rows)


_COS, _SIN = _angles(9, 32)
_ANGLES3 = _drawn(3, 2, 9, 16).repeat(1, 1, 1, 2)  # of time, height and width
_LABELS = _drawn(6, high=300)
_ROWS = (6, 300)


def _ce_tvd(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    apart = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
    return F.cross_entropy(student, target, reduction="none"), apart


#: Name -> the operation, at sizes that take seconds in emulation.
OPS: dict[str, Op] = {
    "rms_norm": Op(
        {"x": _ROWS, "w": (300,)}, lambda x, w: _f().liger_rms_norm(x, w, 1e-6, in_place=False),
        lambda x, w: _rms(x) * w,
    ),
    "layer_norm": Op(
        {"x": _ROWS, "w": (300,), "b": (300,)}, lambda x, w, b: _f().liger_layer_norm(x, w, b, 1e-6),
        lambda x, w, b: F.layer_norm(x, (300,), w, b, 1e-6),
    ),
    "group_norm": Op(
        {"x": (2, 6, 50), "w": (6,), "b": (6,)}, lambda x, w, b: _f().liger_group_norm(x, w, b, 6, 3, 1e-6),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-6),
    ),
    "fused_add_rms_norm": Op(
        {"x": _ROWS, "r": _ROWS, "w": (300,)},
        lambda x, r, w: _f().liger_fused_add_rms_norm(x, r, w, 1e-6, in_place=False),
        lambda x, r, w: (_rms(x + r) * w, x + r),
    ),
    "modulated_rms_norm": Op(
        {"x": (2, 3, 300), "w": (300,), "scale": (2, 3, 300), "shift": (2, 3, 300)},
        lambda x, w, scale, shift: _f().liger_modulated_rms_norm(x, w, scale, shift, in_place=False),
        lambda x, w, scale, shift: _rms(x) * w * (1 + scale) + shift,
    ),
    "poly_norm": Op(
        {"x": _ROWS, "w": (3,), "b": ()}, lambda x, w, b: _f().liger_poly_norm(x, w, b, in_place=False),
        lambda x, w, b: w[0] * _rms(x**3) + w[1] * _rms(x**2) + w[2] * _rms(x) + b,
    ),
    "dyt": Op(
        {"x": _ROWS, "alpha": (1,), "gamma": (300,), "beta": (300,)}, lambda *v: _f().liger_dyt(*v),
        lambda x, alpha, gamma, beta: gamma * torch.tanh(alpha * x) + beta, backward=False,
    ),
    "swiglu": Op(
        {"a": _ROWS, "b": _ROWS}, lambda a, b: _f().liger_swiglu(a, b), lambda a, b: F.silu(a) * b
    ),
    "geglu": Op(
        {"a": _ROWS, "b": _ROWS}, lambda a, b: _f().liger_geglu(a, b),
        lambda a, b: F.gelu(a, approximate="tanh") * b,
    ),
    "relu_squared": Op({"x": _ROWS}, lambda x: _f().liger_relu_squared(x), lambda x: F.relu(x) ** 2),
    "softmax": Op({"x": _ROWS}, lambda x: _f().liger_softmax(x), lambda x: x.softmax(-1)),
    "sparsemax": Op({"x": _ROWS}, lambda x: _f().liger_sparsemax(x), _sparsemax),
    "rope": Op(
        {"q": (2, 3, 9, 32), "k": (2, 2, 9, 32)}, lambda q, k, cos, sin: _f().liger_rope(q, k, cos, sin),
        lambda q, k, cos, sin: (q * cos + _turned(q) * sin, k * cos + _turned(k) * sin),
        {"cos": _COS, "sin": _SIN},
    ),
    "qwen2vl_mrope": Op(
        {"q": (2, 3, 9, 32), "k": (2, 2, 9, 32)},
        lambda q, k, cos, sin: _f().liger_qwen2vl_mrope(q, k, cos, sin, [4, 6, 6]), _mrope,
        {"cos": _ANGLES3.cos(), "sin": _ANGLES3.sin()},
    ),
    "llama4_rope": Op(
        {"q": (2, 9, 3, 32), "k": (2, 9, 2, 32)},
        lambda q, k, angles: _ops().LigerLlama4RopeFunction.apply(q, k, torch.polar(torch.ones_like(angles), angles)),
        _llama4, {"angles": _drawn(9, 16)},
    ),
    "cross_entropy": Op(
        {"x": _ROWS}, lambda x, y: _f().liger_cross_entropy(x.clone(), y, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), {"y": _LABELS},
    ),
    "kl_div": Op(
        {"x": _ROWS}, lambda x, p: _f().liger_kl_div(x.log_softmax(-1), p, reduction="batchmean"),
        lambda x, p: F.kl_div(x.log_softmax(-1), p, reduction="batchmean"), {"p": _drawn(*_ROWS).softmax(-1)},
    ),
    "jsd": Op(
        {"x": _ROWS}, lambda x, t: _f().liger_jsd(x.log_softmax(-1), t), lambda x, t: _jsd(x.log_softmax(-1), t),
        {"t": _drawn(*_ROWS).log_softmax(-1)},
    ),
    "tvd": Op(
        {"x": _ROWS}, lambda x, q: _f().liger_tvd(x.softmax(-1), q, reduction="batchmean"),
        lambda x, q: (x.softmax(-1) - q).abs().sum() / 2 / 6, {"q": _drawn(*_ROWS).softmax(-1)},
    ),
    "fused_ce_tvd": Op(
        {"x": _ROWS}, lambda x, t, y: _ops().fused_ce_tvd.LigerFusedCETVDFunction.apply(x, t, y), _ce_tvd,
        {"t": _drawn(*_ROWS), "y": _LABELS},
    ),
    "fused_linear_cross_entropy": Op(
        {"x": (6, 32), "w": (300, 32)}, lambda x, w, y: _f().liger_fused_linear_cross_entropy(x, w, y),
        lambda x, w, y: F.cross_entropy(x @ w.T, y), {"y": _LABELS},
    ),
    "fused_linear_jsd": Op(
        {"x": (6, 32), "w": (300, 32)}, lambda x, w, t, v: _f().liger_fused_linear_jsd(x, w, t, v),
        lambda x, w, t, v: _jsd((x @ w.T).log_softmax(-1), (t @ v.T).log_softmax(-1)),
        {"t": _drawn(6, 32), "v": _drawn(300, 32, seed=6)},
    ),
    "fused_linear_kl_div": Op(
        {"x": (6, 32), "w": (300, 32)}, lambda x, w, p: _f().liger_fused_linear_kl_div(x, w, p),
        lambda x, w, p: F.kl_div((x @ w.T).log_softmax(-1), p, reduction="batchmean"),
        {"p": _drawn(*_ROWS).softmax(-1)},
    ),
    "grpo_loss": Op(
        {"logits": (2, 5, 300)}, _grpo_liger, _grpo,
        {"ids": _drawn(2, 4, high=300), "old": -5 + 0.3 * _drawn(2, 4), "ref": -5 + 0.3 * _drawn(2, 4, seed=7),
         "gain": _drawn(2)},
    ),
    "multi_token_attention": Op(
        {"scores": (1, 2, 32, 32), "weight": (2, 2, 3, 3), "bias": (2,)},
        lambda s, w, b: _f().liger_multi_token_attention(s, w, b, padding=1), _tokens,
    ),
    "fused_neighborhood_attention": Op(
        {"q": (1, 2, 48, 32), "k": (1, 2, 48, 32), "v": (1, 2, 48, 32)},
        lambda q, k, v: _f().liger_fused_neighborhood_attention(q, k, v), _neighbours,
    ),
    "attn_res": Op(
        {"v": (4, 1, 5, 64), "query": (64,), "norm": (64,)}, lambda *v: _f().liger_attn_res(*v), _residuals
    ),
    "mhc_coeffs": Op(
        {"x": (2, 5, 4, 64), "phi": (256, 24), "b": (24,), "pre": (), "post": (), "res": ()},
        lambda x, phi, *v: _f().liger_mhc_coeffs(x, phi / 16, *v, allow_fp32=True), _coefficients,
    ),
    "mhc_pre": Op(
        {"x": (2, 5, 4, 64), "h": (2, 5, 4)}, lambda x, h: _f().liger_mhc_pre(x, h),
        lambda x, h: (x * h[..., None]).sum(-2),
    ),
    "mhc_post_res": Op(
        {"x": (2, 5, 4, 64), "f": (2, 5, 64), "post": (2, 5, 4), "res": (2, 5, 4, 4)},
        lambda *v: _f().liger_mhc_post_res(*v),
        lambda x, f, post, res: torch.einsum("bnij,bnjc->bnic", res, x) + post[..., None] * f[..., None, :],
    ),
    "fused_moe": Op(
        {"x": (8, 32), "up": (4, 64, 32), "down": (4, 32, 32)},
        lambda x, up, down, chosen, weight: _ops().LigerFusedMoEFunction.apply(x, up, down, chosen.int(), weight),
        _experts, {"chosen": _drawn(8, 4).argsort(-1)[:, :2], "weight": _drawn(8, 2).softmax(-1)},
    ),
}  # fmt: skip

#: Name -> the reason why it has no row: it cannot be called without a GPU.
LEFT_OUT = {
    "mlp": "asks that its tensors are on a CUDA device",
    "fused_linear_scaled_cross_entropy_tp": "asks for a CUDA device and a group of processes",
    "vocab_parallel_cross_entropy": "asks for a group of processes",
    "tiled_mlp": "has no kernel of its own",
}


def inputs(op: Op) -> dict[str, Tensor]:
    """The operation's random inputs, float32; those with a gradient first."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in op.shapes.items()} | op.fixed


def differentiated(call: Callable[..., Outputs], op: Op, dtype: torch.dtype) -> list[Tensor]:
    """The operation's outputs and the gradients of its inputs, from inputs and output gradients rounded to float32."""
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs(op).items()}
    leaves = [given[name].requires_grad_() for name in op.shapes]
    found = call(*given.values())
    outputs = [found] if isinstance(found, Tensor) else [one for one in found if one is not None]
    if not op.backward:
        return [one.detach().clone() for one in outputs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(one.shape, generator=generator).to(one.dtype) for one in outputs]
    made = torch.autograd.grad(outputs, leaves, grads)
    return [one.detach().clone() for one in (*outputs, *made)]


def error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest relative error of a tensor: Frobenius norm of the difference over that of the exact one."""
    pairs = zip(found, exact, strict=True)
    return max(float((one.double() - want).norm() / want.norm().clamp(min=1e-30)) for one, want in pairs)
