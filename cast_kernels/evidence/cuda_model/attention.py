"""The attention kernels, forward and backward, and the variant whose attention is a part of `exchange`."""

from __future__ import annotations

from cast_kernels.evidence.cuda_model import design
from cast_kernels.evidence.cuda_model.arithmetic import Cta, Launch
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes
from cast_kernels.evidence.cuda_model.rows import COLUMN, STORE, exchange_kernel, row_cta

#: Instructions for a score: scale, maximum, exponential, sum, mask, pack; in backward also dP and dS. By hand.
SCORE, SCORE_BACKWARD = 6.0, 8.0
#: What a score of a short window takes more: masks, and little to share.
SHORT = 1.5
#: Instructions of a warp around one copy of 512 bytes by cp.async: its address, its guard. By hand.
COPY = 3.0
#: FLOP of one `mma.sync` m16n8k16, and bytes of one `ldmatrix` or of one warp's copy.
_MMA, _WORD = 4096, 512
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


def attention_cta(rows: int, keys: float, long: bool) -> Cta:
    """Queries of two heads against so many keys a query: all of the tile's, or in short windows the own 16 rows'."""
    scores = rows * keys * _HEADS
    flops = 2 * 2 * scores * _CHANNELS / _HEADS
    warps = rows // 16
    held = 2 * (keys if long else rows) * _CHANNELS * 2  # keys and values
    came = held + rows * _CHANNELS * 2
    read = held * (warps if long else 1) + rows * _CHANNELS * 2  # every warp reads all keys that it asks
    issue = scores / 32 * SCORE * (1 if long else SHORT) + flops / _MMA + read / _WORD + came / _WORD * COPY
    return Cta(
        {"mma": flops}, came + read, 2 * rows * _CHANNELS * 2, came, issue, scores,
        rows * _CHANNELS * (STORE + 1) / 32, warps,
    )  # fmt: skip


def attention_bytes(sizes: Sizes, rows: int = 64) -> float:
    """Bytes of queries, keys and values that CTAs take in from L2, both directions."""
    return 2 * sum(long_tiles(sizes, rows)) * sizes.d * 2 + sizes.unit + 3 * sizes.unit


def attention(sizes: Sizes) -> Launch:
    """Both directions: 64 queries of two heads a CTA, by `mma.sync`. Writes O and log-sum-exp."""
    tiles = long_tiles(sizes)
    ctas = [
        (groups(sizes) * tiles.count(keys), attention_cta(64, keys, long=True))
        for keys in sorted(set(tiles), reverse=True)
    ]
    ctas.append((groups(sizes) * -(-sizes.patch_rows // 64), attention_cta(64, 16, long=False)))
    left = 2 * sizes.unit + 2 * sizes.scores
    return Launch(
        "attention", ctas, attention_bytes(sizes) + left, 6 * sizes.unit + left, per_sm=design.ATTENTION.per_sm
    )  # fmt: skip


def exchange_with_attention(sizes: Sizes, choice: Choice) -> Launch:
    """`exchange` whose warps attend first, head by head. O is written all the same: backward reads it."""
    kernel, ctas = exchange_kernel(sizes), []
    tiles = long_tiles(sizes, choice.rows)
    keys = {"temporal": sum(tiles) / len(tiles), "spatial": 16}  # the long direction first
    for stream, of in keys.items():
        base = row_cta(
            choice.rows, kernel.products, kernel.instructions, kernel.leaving + 2 * sizes.d, kernel.coming[stream]
        )
        one, number = attention_cta(choice.rows, of, long=stream == "temporal"), groups(sizes)
        ctas.append((
            choice.ctas(sizes.rows[stream]),
            Cta(
                {"wgmma": base.flops, "mma": number * one.flops}, base.shared,
                base.staged + number * (one.shared + one.staged), base.intake + number * one.intake, base.issue,
                epilogue=base.epilogue + number * (one.issue + one.epilogue), warps=base.warps,
            ),
        ))  # fmt: skip
    count = sum(number for number, _ in ctas)
    written = kernel.tensors + 2 * sizes.scores  # O counts as written, where `exchange` counts it as read
    return Launch(
        "exchange with attention", ctas,
        count * kernel.weights / choice.cluster + written + attention_bytes(sizes, choice.rows),
        written + 6 * sizes.unit + 2 * kernel.weights, choice.cluster, design.row(choice.rows, 2).per_sm,
    )  # fmt: skip


def exchange(sizes: Sizes, choice: Choice) -> list[Launch]:
    """From queries, keys and values to the streams: one launch, or attention and the rest."""
    if choice.fused:
        return [exchange_with_attention(sizes, choice)]
    return [attention(sizes), exchange_kernel(sizes).launch(sizes, choice)]


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
        per_sm=design.ATTENTION_BACKWARD_LONG.per_sm,
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
        per_sm=design.ATTENTION_BACKWARD_SHORT.per_sm,
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
