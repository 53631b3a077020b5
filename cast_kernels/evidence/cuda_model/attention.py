"""The attention kernels, forward and backward, and variants whose attention is a part of `exchange`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cast_kernels.evidence.cuda_model import design
from cast_kernels.evidence.cuda_model.arithmetic import Cta, Launch
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes
from cast_kernels.evidence.cuda_model.rows import COLUMN, STORE, exchange_kernel

#: Instructions for a score: scale, maximum, exponential, sum, mask, pack; in backward also dP and dS. By hand.
SCORE, SCORE_BACKWARD = 6.0, 8.0
#: What a score of a short window takes more: masks, and little to share.
SHORT = 1.5
#: Instructions of a warp around one copy of 512 bytes by cp.async: its address, its guard. By hand.
COPY = 3.0
#: FLOP of one `mma.sync` m16n8k16, and bytes of one `ldmatrix` or of one warp's copy.
_MMA, _WORD = 4096, 512
#: Directions, and the stream that asks in each.
WAYS = ("s2t", "t2s")
_ASKING = {"t2s": "spatial", "s2t": "temporal"}
#: Channels and heads of a CTA of the kernels on `mma.sync`.
_CHANNELS, _HEADS = 64, 2


def groups(sizes: Sizes) -> int:
    """CTAs that share the rows of a tile."""
    return sizes.d // _CHANNELS


def long_tiles(sizes: Sizes, rows: int = 64) -> list[int]:
    """Keys of each tile of queries in windows of space: of whole windows that it touches, in blocks of 64."""
    window, found = sizes.patches, []
    for low in range(0, sizes.patch_rows, rows):
        high = min(low + rows, sizes.patch_rows)
        keys = (-(-high // window) - low // window) * window
        found.append(-(-keys // 64) * 64)
    return found


def warp_keys(sizes: Sizes) -> float:
    """Keys that a warp of 16 queries computes with in long windows: it skips blocks of which it asks nothing."""
    found = long_tiles(sizes, 16)
    return sum(found) / len(found)


def attention_cta(rows: int, keys: float, mine: float, long: bool) -> Cta:
    """Queries of two heads.

    Args:
        rows: queries.
        keys: that the CTA loads.
        mine: that a warp computes with, one block after the other.
        long: whether the windows are.
    """
    scores = rows * mine * _HEADS
    flops = 2 * 2 * scores * _CHANNELS / _HEADS
    warps, query = rows // 16, rows * _CHANNELS * 2
    came = 2 * keys * _CHANNELS * 2 + query
    read = warps * 2 * mine * _CHANNELS * 2 + query
    issue = scores / 32 * SCORE * (1 if long else SHORT) + flops / _MMA + read / _WORD + came / _WORD * COPY
    return Cta({"mma": flops}, came + read, 2 * query, came, issue, scores, rows * _CHANNELS * (STORE + 1) / 32, warps)


def long_cta(sizes: Sizes, rows: int, keys: float) -> Cta:
    """Windows of space, in a tile that so many keys belong to."""
    return attention_cta(rows, keys, min(warp_keys(sizes), keys), long=True)


def short_cta(rows: int) -> Cta:
    """Windows of time: the keys are those of the queries' own rows, and a warp's those of its own 16."""
    return attention_cta(rows, rows, 16, long=False)


def attention_bytes(sizes: Sizes, way: str, rows: int) -> float:
    """Bytes of a direction's queries, keys and values that CTAs take in from L2."""
    keys = 2 * sum(long_tiles(sizes, rows)) * sizes.d * 2 if way == "s2t" else 2 * sizes.unit
    return keys + sizes.unit


def attention(sizes: Sizes, choice: Choice, ways: Sequence[str] = WAYS) -> Launch:
    """Some queries of two heads a CTA, by `mma.sync`; the long windows first. Writes O and log-sum-exp."""
    rows, ctas = choice.queries, []
    tiles = long_tiles(sizes, rows)
    if "s2t" in ways:
        for keys in sorted(set(tiles), reverse=True):
            ctas.append((groups(sizes) * tiles.count(keys), long_cta(sizes, rows, keys)))
    if "t2s" in ways:
        ctas.append((groups(sizes) * -(-sizes.patch_rows // rows), short_cta(rows)))
    left = len(ways) * (sizes.unit + sizes.scores)
    return Launch(
        "attention", ctas, sum(attention_bytes(sizes, way, rows) for way in ways) + left,
        3 * len(ways) * sizes.unit + left, per_sm=design.attention(rows).per_sm, spilled=design.attention(rows).spilled,
    )  # fmt: skip


def exchange(sizes: Sizes, choice: Choice) -> list[Launch]:
    """From queries, keys and values to the streams: attention and the rest, or one launch.

    Where attention is inside, the warps attend before their first product, head by head. O is written all the same, for
    backward: it counts once in either case.
    """
    kernel, tiles = exchange_kernel(sizes), long_tiles(sizes)
    keys = sum(tiles) / len(tiles)
    before, again, tensors = {}, 0.0, 0.0
    for way in choice.inside:
        one, number = long_cta(sizes, 64, keys) if way == "s2t" else short_cta(64), groups(sizes)
        before[_ASKING[way]] = Cta(
            {"mma": number * one.flops}, number * one.shared, number * one.staged, number * one.intake,
            issue=number * one.issue, epilogue=number * one.epilogue,
        )  # fmt: skip
        tensors += 3 * sizes.unit + sizes.scores
        again += attention_bytes(sizes, way, 64) - 3 * sizes.unit
    kernel = replace(kernel, before=before, again=again, tensors=kernel.tensors + tensors)
    outside = [way for way in WAYS if way not in choice.inside]
    return [*([attention(sizes, choice, outside)] if outside else []), kernel.launch(sizes, choice)]


def attention_backward_long(sizes: Sizes) -> Launch:
    """s2t: a window and a head in a CTA, S and dP once, by `wgmma`.

    Position sums of a clip's frames are added up before they leave: by a cluster of the clip's CTAs, or by one CTA
    frame by frame.
    """
    window, rows = -(-sizes.patches // 16) * 16, -(-sizes.patches // 64) * 64
    head = sizes.d // sizes.heads
    scores, tensor = rows * window, window * head * 2
    products = 5 * tensor * (rows // 64)  # a right side, read by every warpgroup
    square = scores * 2  # P, and dS: written, and read by dV; written, and read by dK and dQ
    cta = Cta(
        {"wgmma": 5 * 2.0 * scores * head}, 5 * tensor + products + 5 * square, 2 * 3 * tensor, 5 * tensor,
        issue=scores * SCORE_BACKWARD / 32, special=scores,
        epilogue=3 * window * head * (STORE + COLUMN) / 32, warps=4 * (rows // 64),
    )  # fmt: skip
    moved = 8 * sizes.unit + sizes.scores + position_bytes(sizes)["s2t"]
    return Launch(
        "attention_backward s2t", [(sizes.batch * sizes.frames * sizes.heads, cta)], moved, moved,
        per_sm=design.ATTENTION_BACKWARD_LONG.per_sm, spilled=design.ATTENTION_BACKWARD_LONG.spilled,
    )  # fmt: skip


def attention_backward_short(sizes: Sizes) -> Launch:
    """t2s: 64 rows of two heads a CTA, by `mma.sync`; position sums over the windows of a CTA."""
    scores, tensor = 64 * 16 * _HEADS, 64 * _CHANNELS * 2
    flops = 5 * 2.0 * scores * _CHANNELS / _HEADS
    issue = (
        scores * SHORT * SCORE_BACKWARD / 32 + flops / _MMA + 4 * tensor / _WORD * (COPY + 2)
        + 3 * 64 * _CHANNELS * COLUMN / 32
    )  # fmt: skip
    cta = Cta(
        {"mma": flops}, 3 * 4 * tensor, 2 * 3 * tensor, 4 * tensor, issue, scores, 3 * 64 * _CHANNELS * STORE / 32
    )
    moved = 7 * sizes.unit + sizes.scores + position_bytes(sizes)["t2s"]
    return Launch(
        "attention_backward t2s", [(_short_ctas(sizes), cta)], moved, moved,
        per_sm=design.ATTENTION_BACKWARD_SHORT.per_sm, spilled=design.ATTENTION_BACKWARD_SHORT.spilled,
    )  # fmt: skip


def _short_ctas(sizes: Sizes) -> int:
    return groups(sizes) * -(-sizes.patch_rows // 64)


def position_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes of position sums in float32: of each clip, or of each CTA of as many as are resident at once."""
    resident = min(_short_ctas(sizes), design.ATTENTION_BACKWARD_SHORT.per_sm * design.HOPPER.processors)
    return {
        "s2t": sizes.batch * sizes.patches * 3 * sizes.d * 4,
        "t2s": resident * sizes.frames * 3 * _CHANNELS * 4,
    }  # fmt: skip
