"""The layers that experts and blocks share, under the parameter names of the published checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_kernels import (
    BackendError,
    FFNParameters,
    Recompute,
    SelfAttentionParameters,
    SelfAttentionProblem,
    ffn,
    plain,
    self_attention,
)
from cast_kernels import attention as kernels
from cast_kernels.plain import BARE_LINEAR, LINEAR, NORM, Reading

#: LayerNorm epsilon of CLIP's and of VideoMAE's norms.
CLIP_EPS, VMAE_EPS = 1e-5, 1e-6
#: Factor of the adapters beside the FFN.
ADAPTER_SCALE = 0.5


class CLIPAttention(nn.Module):
    """CLIP's multi-head self-attention, with one packed input projection. `attend` reads it or calls it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight: nn.Parameter = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias: nn.Parameter = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj: nn.Linear = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, kernel: str = "auto") -> Tensor:
        """[..., tokens, D] -> the same; `kernel` attends, see `cast_kernels.attention`."""
        return self.out_proj(_mix(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads, kernel))

    reading: Reading = Reading(forward, ("in_proj_weight", "in_proj_bias"), layers={"out_proj": LINEAR})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [3D, D] and bias of queries, keys, values in this order, then of the output projection."""
        out = self.out_proj
        return self.in_proj_weight, self.in_proj_bias, out.weight, out.bias


class VideoMAEAttention(nn.Module):
    """VideoMAE's multi-head self-attention; queries and values have a bias. `attend` reads it or calls it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_bias: nn.Parameter = nn.Parameter(torch.zeros(dim))
        self.v_bias: nn.Parameter = nn.Parameter(torch.zeros(dim))
        self.qkv: nn.Linear = nn.Linear(dim, 3 * dim, bias=False)
        self.proj: nn.Linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, kernel: str = "auto") -> Tensor:
        """[..., tokens, D] -> the same; `kernel` attends, see `cast_kernels.attention`."""
        return self.proj(_mix(_added(self.qkv(x), self._bias()), self.num_heads, kernel))

    reading: Reading = Reading(forward, ("q_bias", "v_bias"), layers={"qkv": BARE_LINEAR, "proj": LINEAR})

    def _bias(self) -> Tensor:
        return _joined(self.q_bias, self.v_bias)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [3D, D] and bias of queries, keys, values in this order, then of the output projection."""
        out = self.proj
        return self.qkv.weight, self._bias(), out.weight, out.bias


def _joined(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """The bias of queries, keys and values; keys have none."""
    return torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))


def _added(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias in the dtype of x, as a linear layer adds its own bias under autocast."""
    return x + bias.to(x.dtype)


def _mix(qkv: Tensor, num_heads: int, kernel: str) -> Tensor:
    """Queries, keys and values side by side, [..., tokens, 3D] -> the attention's result, [..., tokens, D]."""
    heads = qkv.reshape(-1, *qkv.shape[-2:]).unflatten(-1, (3, num_heads, -1))
    problem = SelfAttentionProblem(
        heads.shape[0], heads.shape[1], qkv.shape[-1] // 3, num_heads, 0, Recompute.CHEAP, qkv.dtype, qkv.device.type,
        attention=kernel,
    )  # fmt: skip
    return kernels.attend(kernels.select(problem), heads).reshape(*qkv.shape[:-1], -1)


class CLIPMlp(nn.Module):
    """CLIP's FFN with QuickGELU, x * sigmoid(1.702 x). `feed_forward` reads it or calls it."""

    activation = "quick_gelu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc: nn.Linear = nn.Linear(dim, hidden)
        self.c_proj: nn.Linear = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # silu(1.702 x) / 1.702 is QuickGELU. It keeps one tensor for backward; x * sigmoid(1.702 x) keeps two.
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)

    reading: Reading = Reading(forward, layers={"c_fc": LINEAR, "c_proj": LINEAR})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first and of the second layer."""
        first, second = self.c_fc, self.c_proj
        return first.weight, first.bias, second.weight, second.bias


class VideoMAEMlp(nn.Module):
    """VideoMAE's FFN with exact GELU. `feed_forward` reads it or calls it."""

    activation = "gelu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Linear = nn.Linear(dim, hidden)
        self.fc2: nn.Linear = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    reading: Reading = Reading(forward, layers={"fc1": LINEAR, "fc2": LINEAR})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first and of the second layer."""
        first, second = self.fc1, self.fc2
        return first.weight, first.bias, second.weight, second.bias


class Adapter(nn.Module):
    """Down, exact GELU, up, without a skip; the up-projection starts at zero (paper section 3.2)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1: nn.Linear = nn.Linear(dim, hidden)
        self.D_fc2: nn.Linear = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)))

    reading: Reading = Reading(forward, layers={"D_fc1": LINEAR, "D_fc2": LINEAR})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the down- and of the up-projection."""
        first, second = self.D_fc1, self.D_fc2
        return first.weight, first.bias, second.weight, second.bias


class Running(NamedTuple):
    """How ops run: the backend, the recomputation in backward (see `cast_kernels.bcast`), and the attention kernel.

    `cast_kernels.attention` lists the kernels.
    """

    backend: str = "auto"
    recompute: str = "auto"
    attention: str = "auto"


class Names(NamedTuple):
    """The names that messages give to the layers of half a block."""

    norm: str
    layer: str
    adapter: str = "adapter"


def _parts(norm: nn.Module | None, layer: nn.Module | None, adapter: nn.Module | None) -> dict[str, nn.Module | None]:
    """The modules of half a block. The last one belongs to one half block only, so `plain` keeps its verdict there."""
    if adapter is None:
        return {"norm": norm, "layer": layer}
    return {"norm": norm, "layer": layer, "adapter": adapter}


def _read(norm: nn.Module, layer: nn.Module, adapter: nn.Module | None) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether a glance shows that the half block has no :func:`obstacle`; and its tensors: norm, layer, adapter.

    The tensors equal those of the layers' `tensors`, without the calls. The tuple is empty if a glance does not show
    them.
    """
    read = plain.at_a_glance(layer if adapter is None else adapter, _parts(norm, layer, adapter))
    if read is None:
        return False, ()
    if adapter is not None and type(adapter) is not Adapter:
        return True, ()
    if type(layer) is VideoMAEAttention:
        weight, bias, q_bias, v_bias, qkv_weight, *rest = read
        return True, (weight, bias, qkv_weight, _joined(q_bias, v_bias), *rest)
    return True, read if type(layer) in (CLIPAttention, CLIPMlp, VideoMAEMlp) else ()


def _called(norm: nn.LayerNorm, layer: Any, adapter: Adapter | None) -> tuple[Tensor, ...]:
    """The half block's tensors, from its layers' methods."""
    return norm.weight, norm.bias, *layer.tensors(), *(() if adapter is None else adapter.tensors())


def obstacle(norm: nn.Module | None, layer: nn.Module | None, adapter: nn.Module | None, names: Names) -> str:
    """The part of half a block that must be called, and why, so that no kernel can run it; "" if there is none.

    Args:
        norm: before attention or FFN.
        layer: the attention or the FFN.
        adapter: its adapter, if it has one.
        names: names of the three for the answer.
    """
    parts, owner = _parts(norm, layer, adapter), layer if adapter is None else adapter
    found = plain.global_obstacle() or plain.obstacle(names.norm, norm, NORM) or plain.obstacle(names.layer, layer)
    if not found and adapter is not None:
        found = plain.obstacle(names.adapter, adapter)
    if not found and owner is not None:
        plain.found_plain(owner, parts, {name: NORM if name == "norm" else None for name in parts})
    return found


def attend(
    x: Tensor,
    norm: nn.LayerNorm,
    attention: CLIPAttention | VideoMAEAttention,
    adapter: Adapter | None,
    running: Running,
    names: Names,
    dims: tuple[int, int] = (1, 1),
) -> Tensor:
    """x + a + adapter(a) with a = attention(norm(x)): [batch, tokens, D] -> the same (paper equation 3).

    `dims` says how many dimensions batch and tokens have, see `cast_kernels.self_attention`.

    Raises:
        BackendError: the kernel asked for by name cannot run it, or would read a layer that must be called.
    """
    plain_layers, tensors = _read(norm, attention, adapter)
    found = "" if plain_layers else obstacle(norm, attention, adapter, names)
    if found:
        plain.announce("self-attention", running.backend, found, attention)
        entries = x.flatten(dims[0], -2).flatten(0, dims[0] - 1)
        return _attend_by_modules(entries, norm, attention, adapter, running.attention).view_as(x)
    parameters = SelfAttentionParameters(*(tensors or _called(norm, attention, adapter)))
    backend, recompute, kernel = running
    return self_attention(
        x, parameters, num_heads=attention.num_heads, eps=norm.eps, dims=dims, recompute=recompute,
        backend=backend, attention=kernel,
    )  # fmt: skip


def _attend_by_modules(
    x: Tensor, norm: nn.Module, attention: nn.Module, adapter: nn.Module | None, kernel: str
) -> Tensor:
    a = attended(attention, norm(x), kernel)
    y = x + a
    if adapter is not None:
        y = y + adapter(a)
    # Under autocast the branches have autocast's dtype; the residual keeps the stream's.
    return y.to(x.dtype)


def attended(attention: nn.Module, x: Tensor, kernel: str) -> Tensor:
    """The attention layer, called: [..., tokens, D] -> the same.

    Raises:
        BackendError: a kernel was asked for by name, and the attention layer was replaced by one that takes no kernel.
    """
    if kernel == "auto":
        return attention(x)
    if isinstance(attention, CLIPAttention | VideoMAEAttention):
        return attention(x, kernel)
    raise BackendError(
        f"attention={kernel!r} was asked for, but the attention was replaced by a {type(attention).__qualname__}, "
        "which takes no kernel; use attention='auto'"
    )


def feed_forward(
    x: Tensor,
    norm: nn.LayerNorm,
    mlp: CLIPMlp | VideoMAEMlp,
    adapter: Adapter | None,
    row_scale: Tensor | None,
    running: Running,
    names: Names,
) -> Tensor:
    """x + mlp(n) + row_scale * 0.5 * adapter(n) with n = norm(x): [..., D] -> the same (paper equations 4 and 5).

    The published code halves the adapters beside the FFN. `row_scale` is a drop-path draw, broadcastable to [...].

    Raises:
        BackendError: the kernel asked for by name cannot run it, or would read a layer that must be called.
    """
    plain_layers, tensors = _read(norm, mlp, adapter)
    found = "" if plain_layers else obstacle(norm, mlp, adapter, names)
    if found:
        plain.announce("the FFN", running.backend, found, mlp)
        return _feed_by_modules(x, norm, mlp, adapter, row_scale)
    parameters = FFNParameters(*(tensors or _called(norm, mlp, adapter)))
    return ffn(
        x, parameters, activation=mlp.activation, eps=norm.eps, adapter_scale=ADAPTER_SCALE, row_scale=row_scale,
        recompute=running.recompute, backend=running.backend,
    )  # fmt: skip


def _feed_by_modules(
    x: Tensor, norm: nn.Module, mlp: nn.Module, adapter: nn.Module | None, row_scale: Tensor | None
) -> Tensor:
    normed = norm(x)
    y = x + mlp(normed)
    if adapter is not None:
        branch = adapter(normed)
        if row_scale is not None:
            branch = branch * row_scale[..., None].to(branch.dtype)
        y = torch.add(y, branch, alpha=ADAPTER_SCALE)
    return y.to(x.dtype)


class TubeletEmbedding(nn.Module):
    """VideoMAE's patch embedding: [B, 3, frames, H, W] -> [B, T*N, D], tokens ordered by time, row, column."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj: nn.Conv3d = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        # Make the result contiguous once. Otherwise every later residual would keep the convolution's channel-first
        # strides.
        return self.proj(video).flatten(2).transpose(1, 2).contiguous()

    reading: Reading = Reading(forward, layers={"proj": Reading(nn.Conv3d.forward, ("weight", "bias"))})


def embed_frames(frames: Tensor, conv: nn.Conv2d, cls: Tensor, positions: Tensor, norm: nn.LayerNorm) -> Tensor:
    """CLIP's embedding: [frames, 3, H, W] -> [frames, 1+N, D], CLS first, patches row-major, normalised."""
    patches = conv(frames).flatten(2).transpose(1, 2)
    cls = cls.to(patches.dtype).expand(frames.shape[0], 1, -1)
    return norm(torch.cat((cls, patches), dim=1) + positions)


def sincos_table(length: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """[1, length, dim] fp32: VideoMAE's fixed positions, computed in fp64 and rounded once.

    Channel j of position p is sin (even j) or cos (odd j) of p / 10000^(2 * floor(j / 2) / dim).
    """
    position = torch.arange(length, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(dim, dtype=torch.float64, device=device)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def init_linears(*modules: nn.Module) -> None:
    """Initialise every Linear: weights normal with std 0.02, biases 0; up-projections of adapters 0.

    The published code truncates at +-2, a hundred deviations away: the distribution is the same, and this takes half
    the time.
    """
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, Adapter):
            nn.init.zeros_(layer.D_fc2.weight)
            nn.init.zeros_(layer.D_fc2.bias)


def drop_factor(shape: tuple[int, ...], rate: float, like: Tensor) -> Tensor:
    """One drop-path draw: 0 with probability `rate`, else 1 / (1 - rate), in the dtype and on the device of `like`."""
    keep = 1 - rate
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)
