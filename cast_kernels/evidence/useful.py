"""FLOPs that B-CAST's kernels cannot avoid: products of the true sizes, each as often as the algorithm needs it.

The emulator's further FLOPs are padding to tiles, keys of other windows, and work that a layout repeats.
"""

from __future__ import annotations

from collections import Counter

from cast_kernels.evidence.cases import Case

_ATTENTION_BACKWARD = 7  # products: S, dP and dQ for query rows; S, dV, dP and dK for key rows


def useful_flops(case: Case) -> Counter[str]:
    """Kernel -> FLOPs of its matrix products in one forward, and in one backward if the case has it."""
    patch_rows = case.batch * case.frames * case.patches
    rows = {"t2s": patch_rows + case.batch * case.frames, "s2t": patch_rows}  # of the asking stream, including CLS
    square = 2 * patch_rows * case.bottleneck**2
    wide = {way: 2 * count * case.bottleneck * case.dim for way, count in rows.items()}
    length = {"time": case.frames, "space": case.patches, "space-time": case.frames * case.patches}
    windows = dict(zip(("t2s", "s2t"), case.windows, strict=True))
    # One product with all scores, such as Q K^T.
    scores = {way: 2 * patch_rows * length[windows[way]] * case.bottleneck for way in case.directions}
    ways, attention = len(case.directions), sum(scores.values())
    up = sum(wide[way] for way in case.directions)
    down, projections = sum(wide.values()), 3 * ways * square
    found = Counter({"project": down + projections, "exchange": 2 * attention + ways * square + up})
    if not case.backward:
        return found
    found["exchange_backward"] = up + ways * square
    found["attention_backward"] = _ATTENTION_BACKWARD * attention
    found["project_backward"] = projections + down
    found["weight_gradient"] = up + down + ways * square + projections
    if case.recompute != "nothing":
        found["exchange_backward"] += ways * square
        found["project"] += projections
    if case.recompute == "all":
        found["project"] += down
        found["exchange"] += 2 * attention
    return found
