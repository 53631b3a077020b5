"""The configuration of a published CAST checkpoint, from its tensors' shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from cast.model.config import CASTConfig
from cast.model.weights.source import Source, read_tensors, strip_prefixes

_NEEDED = (
    "clip_positional_embedding",
    "clip_conv1.weight",
    "patch_embed.proj.weight",
    "blocks.0.clip_mlp.c_fc.weight",
    "blocks.0.S_Adapter.D_fc1.weight",
)
_DEFAULT_FRAMES = 16


def read_official(source: Source, trust_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a CAST checkpoint under official names, without containers and prefixes."""
    return strip_prefixes(read_tensors(source, trust_pickle), ("backbone.", "encoder.", "model."))


def infer_config(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> CASTConfig:
    """The configuration, with every size that a shape or a name determines.

    Nothing determines the number of attention heads (`num_heads`, else D / 64) and drop path. The number of frames is
    16 if no window runs along time or the model has no positional embeddings.

    Raises:
        ValueError: no CAST checkpoint, or impossible sizes; the message says what is missing.
    """
    missing = [key for key in _NEEDED if key not in tensors]
    if missing:
        raise ValueError(
            f"no CAST checkpoint in the official layout: {', '.join(missing)} missing among {len(tensors)} tensors"
        )
    patches, dim = tensors["clip_positional_embedding"].shape[0] - 1, tensors["clip_positional_embedding"].shape[1]
    tubelet, patch = tensors["patch_embed.proj.weight"].shape[2], tensors["clip_conv1.weight"].shape[-1]
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ValueError(f"clip_positional_embedding is for {patches} patches, which is no square grid")
    if num_heads is None and dim % 64:
        raise ValueError(f"num_heads cannot be read from shapes, and {dim} is no multiple of 64: pass num_heads")
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    exchange = _exchange(tensors, dim, depth)
    frames = exchange.pop("frames", None)
    return CASTConfig(
        image_size=grid * patch,
        patch_size=patch,
        num_frames=_DEFAULT_FRAMES if frames is None else frames * tubelet,
        tubelet_size=tubelet,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64 if num_heads is None else num_heads,
        mlp_ratio=tensors["blocks.0.clip_mlp.c_fc.weight"].shape[0] / dim,
        adapter_ratio=tensors["blocks.0.S_Adapter.D_fc1.weight"].shape[0] / dim,
        heads=_heads(tensors),
        **exchange,
    )


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    names = {"head_verb.weight": "verb", "head_noun.weight": "noun", "head.weight": "action"}
    heads = {name: tensors[key].shape[0] for key, name in names.items() if key in tensors}
    if not heads:
        raise ValueError("no head in the checkpoint: expected head_verb and head_noun, or head")
    return heads


def _exchange(tensors: Mapping[str, Tensor], dim: int, depth: int) -> dict:
    """The fields of the exchange, and `frames` if a position table gives it."""
    layers = tuple(i for i in range(depth) if f"blocks.{i}.cross_s_down.weight" in tensors)
    if not layers:
        return {"directions": ()}
    block = f"blocks.{layers[0]}."
    directions = tuple(d for d in ("t2s", "s2t") if f"{block}{d}_cross.{d}_q.weight" in tensors)
    windows = dict(zip(("t2s", "s2t"), CASTConfig.windows, strict=True))
    frames, positions = None, False
    for direction in directions:
        axes = [axis for axis in ("space", "time") if f"{block}{direction}_cross.clip_{axis}_pos" in tensors]
        if axes:
            windows[direction], positions = "-".join(axes), True  # a space-time window has both tables
        if "time" in axes:
            frames = tensors[f"{block}{direction}_cross.clip_time_pos"].shape[0]
    return {
        "down_ratio": dim / tensors[f"{block}cross_s_down.weight"].shape[0],
        "directions": directions,
        "windows": tuple(windows.values()),
        "positions": positions,
        "exchange_layers": None if len(layers) == depth else layers,
        "frames": frames,
    }
