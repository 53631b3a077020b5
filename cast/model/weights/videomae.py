"""VideoMAE's encoder in four layouts: official, MMAction2, transformers, and our TemporalExpert (the official one)."""

from __future__ import annotations

from torch import Tensor

from cast.model.layers import sincos_table
from cast.model.weights.rename import KeyMap, translate
from cast.model.weights.source import Source, read_tensors, strip_prefixes

_WB = r"(weight|bias)"

_OFFICIAL: KeyMap = [
    (rf"patch_embed\.proj\.{_WB}", r"patch_embed.proj.\1"),
    (rf"blocks\.(\d+)\.(norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.{_WB}", r"blocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.attn\.(q_bias|v_bias|qkv\.weight)", r"blocks.\1.attn.\2"),
    (rf"fc_norm\.{_WB}", r"fc_norm.\1"),
    (r"pos_embed", "pos_embed"),  # MVD has its own table; a model with VideoMAE's fixed table refuses it
    # The pre-training decoder, the norm before it, and classifiers.
    (rf"norm\.{_WB}|decoder\..*|encoder_to_decoder\.weight|mask_token|heads?\..*", None),
    # MVD's two decoders, of image and of video features.
    (r"(decoder|down|mask_token|pos_embed)_(img|vid)(\..*)?", None),
]

_MMACTION: KeyMap = [
    (rf"patch_embed\.projection\.{_WB}", r"patch_embed.proj.\1"),
    (rf"blocks\.(\d+)\.mlp\.layers\.0\.0\.{_WB}", r"blocks.\1.mlp.fc1.\2"),
    (rf"blocks\.(\d+)\.mlp\.layers\.1\.{_WB}", r"blocks.\1.mlp.fc2.\2"),
    # The classifier, the pre-training decoder, and the mean and deviation of pixels.
    (r"cls_head\..*|neck\..*|data_preprocessor\..*", None),
    *_OFFICIAL,
]

#: Values of a sine table lie between -1 and 1; stored in half precision they are off by less than this.
_ROUNDING = 1e-3

_LAYER = r"encoder\.layer\.(\d+)\."

_HUGGING_FACE: KeyMap = [
    (rf"embeddings\.patch_embeddings\.projection\.{_WB}", r"patch_embed.proj.\1"),
    (rf"{_LAYER}attention\.attention\.(q)uery\.weight", r"blocks.\1.attn.qkv.weight[\2]"),
    (rf"{_LAYER}attention\.attention\.(k)ey\.weight", r"blocks.\1.attn.qkv.weight[\2]"),
    (rf"{_LAYER}attention\.attention\.(v)alue\.weight", r"blocks.\1.attn.qkv.weight[\2]"),
    (rf"{_LAYER}attention\.attention\.(?:q_bias|query\.bias)", r"blocks.\1.attn.q_bias"),
    (rf"{_LAYER}attention\.attention\.(?:v_bias|value\.bias)", r"blocks.\1.attn.v_bias"),
    # A key bias adds the same number to all scores of a query, so softmax cancels it.
    (rf"{_LAYER}attention\.attention\.key\.bias", None),
    (rf"{_LAYER}attention\.output\.dense\.{_WB}", r"blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}intermediate\.dense\.{_WB}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}output\.dense\.{_WB}", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_LAYER}layernorm_before\.{_WB}", r"blocks.\1.norm1.\2"),
    (rf"{_LAYER}layernorm_after\.{_WB}", r"blocks.\1.norm2.\2"),
    (rf"fc_norm\.{_WB}", r"fc_norm.\1"),
    (rf"layernorm\.{_WB}|decoder\..*|encoder_to_decoder\.weight|mask_token", None),
    (rf"classifier\.{_WB}", None),
]


def read_videomae(source: Source, trust_pickle: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """VideoMAE's encoder under its official names without prefix, and the keys that no pattern matches."""
    tensors = strip_prefixes(read_tensors(source, trust_pickle), ("videomae.",))
    if any("encoder.layer." in key for key in tensors):
        return translate(tensors, _HUGGING_FACE)
    tensors = strip_prefixes(tensors, ("backbone.", "encoder."))
    if "patch_embed.projection.weight" in tensors:
        renamed, unknown = translate(tensors, _MMACTION)
        return _without_sine_table(renamed), unknown
    return translate(tensors, _OFFICIAL)


def _without_sine_table(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without MMAction2's copy of VideoMAE's fixed table. A learned table stays, and does not fit later."""
    table = tensors.get("pos_embed")
    if table is None or table.dim() != 3:
        return tensors
    fixed = sincos_table(*table.shape[1:]).to(table.device)
    if table.shape != fixed.shape or (table.float() - fixed).abs().max() > _ROUNDING:
        return tensors
    return {key: tensor for key, tensor in tensors.items() if key != "pos_embed"}
