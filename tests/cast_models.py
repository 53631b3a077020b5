"""Small models with nothing at zero, and the published block written out once more, for the model's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import cast

#: Golden files and the heads of their models.
GOLDEN = {"cast_compositional_tiny": {"noun": 300, "verb": 97}, "cast_one_head_tiny": {"action": 7}}

SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 6,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value: matrices of unit gain, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter[0].numel() if parameter.dim() > 1 and "pos" not in name else 4
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise * fan_in**-0.5 + is_gain)
    return module


def small_model(seed: int = 0, **overrides: Any) -> cast.CAST:
    """A randomised fp64 CAST of 2 blocks, 3 exchange frames, 4 patches, in evaluation mode."""
    model = cast.CAST(**(SMALL | overrides))
    return randomise(model, seed).double().eval()  # type: ignore[return-value]


def set_layer(block: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with this name."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, layer)


def small_video(model: cast.CAST, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    config = model.config
    size = (batch, 3, config.num_frames, config.image_size, config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def read_golden(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A golden file's metadata and tensors."""
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def open_clip_model() -> nn.Module:
    """open_clip's CLIP at the size of SMALL, randomised, in evaluation mode."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
    return randomise(open_clip.model.CLIP(6, vision, text, quick_gelu=True)).eval()


def published_block(
    weights: dict[str, Tensor],
    spatial: Tensor,
    temporal: Tensor,
    num_heads: int,
    drops: tuple[Tensor | float, ...] = (1.0, 1.0, 1.0, 1.0),
    wrong: str = "",
) -> tuple[Tensor, Tensor]:
    """One block in the published code's own layouts: spatial [1+N, B*T, D], temporal [B, T*N, D].

    `drops` are the four drop-path factors in the order in which they are drawn. `wrong` names one deviation:
    how a reader of the paper, or of a report on it, might have built the block instead.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def quick_gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def adapter(name: str, x: Tensor) -> Tensor:
        activation = quick_gelu if wrong == "quickgelu in adapters" else F.gelu
        return linear(f"{name}.D_fc2", activation(linear(f"{name}.D_fc1", x)))

    def attention(q: Tensor, k: Tensor, v: Tensor, scaled: bool = True) -> Tensor:
        """[..., tokens, channels], heads split inside."""
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(-2, -3) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaled else 1)
        return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)

    def cross(direction: str, asking: Tensor, answering: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """[groups, tokens, d]."""
        own = f"{direction}_cross.{direction}"
        q_bias = 0 if wrong == "no query bias" else weights[f"{own}_q_bias"]
        kv_bias = 0 if wrong == "no key and value bias" else weights[f"{own}_kv_bias"]
        if wrong == "no positions":
            q_pos, kv_pos = torch.zeros_like(q_pos), torch.zeros_like(kv_pos)
        q = linear(f"{own}_q", asking + q_pos) + q_bias
        k, v = (linear(f"{own}_kv", answering + kv_pos) + kv_bias).chunk(2, -1)
        if wrong == "positions on keys only":
            v = (linear(f"{own}_kv", answering) + kv_bias).chunk(2, -1)[1]
        mixed = attention(q, k, v, scaled=wrong != "unscaled scores")
        return mixed if wrong == "no output projection" else linear(f"{direction}_cross.t2s_proj", mixed)

    clips, patches = temporal.shape[0], spatial.shape[0] - 1
    frames = spatial.shape[1] // clips
    clip_eps = 1e-6 if wrong == "eps 1e-6 in CLIP" else 1e-5
    vmae_eps = 1e-5 if wrong == "eps 1e-5 in VideoMAE" else 1e-6
    cross_eps = 1e-5 if wrong == "eps 1e-5 in the exchange" else 1e-6
    skip = 0 if wrong == "no inner skip" else 1

    packed = F.linear(
        norm("clip_ln_1", spatial, clip_eps).transpose(0, 1),
        weights["clip_attn.in_proj_weight"],
        weights["clip_attn.in_proj_bias"],
    )
    a = linear("clip_attn.out_proj", attention(*packed.chunk(3, -1)).transpose(0, 1))
    spatial = spatial + skip * a + adapter("S_Adapter", a)

    qkv = linear("attn.qkv", norm("norm1", temporal, vmae_eps)).chunk(3, -1)
    a = linear("attn.proj", attention(qkv[0] + weights["attn.q_bias"], qkv[1], qkv[2] + weights["attn.v_bias"]))
    temporal = temporal + skip * a + adapter("T_Adapter", a)

    def down(letter: str, x: Tensor) -> Tensor:
        if wrong == "norm before down":
            return linear(f"cross_{letter}_down", F.layer_norm(x, x.shape[-1:], eps=cross_eps))
        return norm(f"ln_{letter}_cross", linear(f"cross_{letter}_down", x), cross_eps)

    us, ut = down("s", spatial), down("t", temporal)
    cls, p = us[:1], us[1:]
    by_patch = p.unflatten(1, (clips, frames)).permute(1, 0, 2, 3).flatten(0, 1)  # [B*N, T, d]
    ut_by_patch = ut.unflatten(1, (frames, patches)).transpose(1, 2).flatten(0, 1)
    pos = {key: weights[f"{d}_cross.{key}"] for d, key in _TABLES}
    answer = cross("t2s", by_patch, ut_by_patch, pos["clip_time_pos"], pos["vmae_time_pos"])
    os = answer.unflatten(0, (clips, patches)).permute(1, 0, 2, 3).flatten(1, 2)  # [N, B*T, d]

    by_frame, ut_by_frame = p.transpose(0, 1), ut.unflatten(1, (frames, patches)).flatten(0, 1)  # [B*T, N, d]
    if wrong == "s2t after t2s":
        by_frame = os.transpose(0, 1)
    clip_pos = pos["clip_space_pos"]
    if wrong == "CLS answers":
        by_frame = torch.cat((cls.transpose(0, 1), by_frame), 1)
        clip_pos = F.pad(clip_pos, (0, 0, 1, 0))
    ot = (
        cross("s2t", ut_by_frame, by_frame, pos["vmae_space_pos"], clip_pos).unflatten(0, (clips, frames)).flatten(1, 2)
    )

    up_s = linear("cross_s_up", F.gelu(torch.cat((cls, os))))
    if wrong == "CLS passes by":
        up_s = torch.cat((torch.zeros_like(up_s[:1]), up_s[1:]))
    spatial = spatial + up_s * drops[0]
    temporal = temporal + linear("cross_t_up", F.gelu(ot)) * drops[1]

    half = 1.0 if wrong == "whole FFN adapter" else 0.5
    y, z = norm("clip_ln_2", spatial, clip_eps), norm("norm2", temporal, vmae_eps)
    clip_act, vmae_act = (F.gelu if wrong == "GELU in CLIP" else quick_gelu), F.gelu
    if wrong == "QuickGELU in VideoMAE":
        vmae_act = quick_gelu
    ffn_s = linear("clip_mlp.c_proj", clip_act(linear("clip_mlp.c_fc", y)))
    ffn_t = linear("mlp.fc2", vmae_act(linear("mlp.fc1", z)))
    spatial = spatial + ffn_s + half * adapter("S_MLP_Adapter", y) * drops[2]
    temporal = temporal + ffn_t + half * adapter("T_MLP_Adapter", z) * drops[3]
    return spatial, temporal


_TABLES = [
    ("t2s", "clip_time_pos"),
    ("t2s", "vmae_time_pos"),
    ("s2t", "clip_space_pos"),
    ("s2t", "vmae_space_pos"),
]
