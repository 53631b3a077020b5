"""CLIP's image tower in four layouts: OpenAI = open_clip, timm, transformers, and our SpatialExpert (OpenAI's)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cast.model.weights.rename import KeyMap, translate
from cast.model.weights.source import Source, read_tensors

_BLOCK = r"transformer.resblocks.\1"
_WB = r"(weight|bias)"

#: The text tower of a whole CLIP model, and settings stored as tensors. CAST has no text tower.
_TEXT = (
    r"transformer\..*|token_embedding\.weight|positional_embedding|text_projection|logit_scale|logit_bias"
    rf"|ln_final\.{_WB}|attn_mask|input_resolution|context_length|vocab_size"
)

_OPENAI: KeyMap = [
    (r"(class_embedding|positional_embedding|conv1\.weight)", r"\1"),
    (rf"(ln_pre|ln_post)\.{_WB}", r"\1.\2"),
    (rf"transformer\.resblocks\.(\d+)\.(ln_1|ln_2|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.{_WB}", rf"{_BLOCK}.\2.\3"),
    (rf"transformer\.resblocks\.(\d+)\.attn\.in_proj_{_WB}", rf"{_BLOCK}.attn.in_proj_\2"),
    (r"proj", None),  # to the space shared with text
    (r"heads\..*", None),  # of a SpatialExpert
]

_TIMM: KeyMap = [
    (r"cls_token", "class_embedding"),
    (r"pos_embed", "positional_embedding"),
    (r"patch_embed\.proj\.weight", "conv1.weight"),
    (rf"norm_pre\.{_WB}", r"ln_pre.\1"),
    (rf"norm\.{_WB}", r"ln_post.\1"),
    (rf"blocks\.(\d+)\.norm([12])\.{_WB}", rf"{_BLOCK}.ln_\2.\3"),
    (rf"blocks\.(\d+)\.attn\.qkv\.{_WB}", rf"{_BLOCK}.attn.in_proj_\2"),
    (rf"blocks\.(\d+)\.attn\.proj\.{_WB}", rf"{_BLOCK}.attn.out_proj.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc1\.{_WB}", rf"{_BLOCK}.mlp.c_fc.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc2\.{_WB}", rf"{_BLOCK}.mlp.c_proj.\2"),
    (rf"head\.{_WB}", None),
]

_HUGGING_FACE: KeyMap = [
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
    (rf"pre_layrnorm\.{_WB}", r"ln_pre.\1"),  # their spelling
    (rf"post_layernorm\.{_WB}", r"ln_post.\1"),
    (rf"encoder\.layers\.(\d+)\.layer_norm([12])\.{_WB}", rf"{_BLOCK}.ln_\2.\3"),
    (rf"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.{_WB}", rf"{_BLOCK}.attn.in_proj_\3[\2]"),
    (rf"encoder\.layers\.(\d+)\.self_attn\.out_proj\.{_WB}", rf"{_BLOCK}.attn.out_proj.\2"),
    (rf"encoder\.layers\.(\d+)\.mlp\.fc1\.{_WB}", rf"{_BLOCK}.mlp.c_fc.\2"),
    (rf"encoder\.layers\.(\d+)\.mlp\.fc2\.{_WB}", rf"{_BLOCK}.mlp.c_proj.\2"),
    (r"embeddings\.position_ids", None),
    (r"text_model\..*|(visual|text)_projection\.weight|logit_scale", None),
]


def read_clip(source: Source, trust_pickle: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """CLIP's image tower under OpenAI's names without `visual.`, and the keys that no pattern matches."""
    tensors = read_tensors(source, trust_pickle)
    if any(key.startswith("visual.") for key in tensors):
        # In a whole CLIP, text and image tower have equal names after their prefix.
        image = [(rf"visual\.{pattern}", name) for pattern, name in _OPENAI]
        return translate(tensors, [*image, (_TEXT, None)])
    if "cls_token" in tensors:
        renamed, unknown = translate(tensors, _TIMM)
        for name in ("class_embedding", "positional_embedding"):
            if name in renamed:  # timm keeps a batch dimension
                renamed[name] = renamed[name].flatten(0, -2).squeeze(0)
        return renamed, unknown
    if any(key.endswith("embeddings.class_embedding") for key in tensors):
        vision = [(rf"(?:vision_model\.)?{pattern}", name) for pattern, name in _HUGGING_FACE]
        return translate(tensors, vision)
    return translate(tensors, _OPENAI)


def fit_positions(tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The tensors of :func:`read_clip` with the position table for a model of another image size.

    The patches' positions are resized like a picture, bicubic with antialiasing in float32, as in open_clip and timm.
    The position of CLS stays. A table that is not of a square grid stays, and so does not fit.

    Args:
        tensors: CLIP's tensors with `positional_embedding` [1 + patches, D].
        tokens: 1 + patches of the model.
    """
    table = tensors.get("positional_embedding")
    if table is None or table.dim() != 2 or len(table) in (0, tokens):
        return tensors
    old, new = math.isqrt(len(table) - 1), math.isqrt(tokens - 1)
    if old == 0 or (old**2, new**2) != (len(table) - 1, tokens - 1):
        return tensors
    picture = table[1:].float().unflatten(0, (old, old)).movedim(-1, 0)[None]
    resized = interpolate(picture, (new, new), mode="bicubic", antialias=True, align_corners=False)
    patches = resized[0].movedim(0, -1).flatten(0, 1).to(table.dtype)
    return tensors | {"positional_embedding": torch.cat((table[:1], patches))}
