"""One line of a report: which backend of a GPU is faster at B-CAST, and so which `auto` should take first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cast_kernels import backends
from cast_kernels.gpu.rows import Row

#: Both, as rows of the benchmarks begin and as `auto` takes them today.
BACKENDS = tuple(name for name in backends.BACKENDS if name in ("triton", "cuda"))
#: Work of a group, as its name ends -> what it is called.
_WORKS = {"inference": "forward", "training": "forward and backward"}
#: Ways of timing in which both are compared, the first that both have: a graph's time is without the host's.
_MODES = ("graph_", "")
#: Ratios of times that are nearer to one than this say nothing.
_NOISE = 0.02


class _Pair(NamedTuple):
    group: str  # its dtypes and clips, "bf16 B6"
    ms: dict[str, float]  # of each backend

    @property
    def ratio(self) -> float:
        """Of the second backend's time to the first one's."""
        return self.ms[BACKENDS[1]] / self.ms[BACKENDS[0]]


def row_of(backend: str) -> str:
    """The name of a backend's row at the default level of recompute."""
    return f"cast_kernels, {backend}"


def line(groups: Mapping[str, Mapping[str, Row]]) -> str:
    """What the groups of the benchmarks, by title, say of the order."""
    found = {work: list(_pairs(groups, work)) for work in _WORKS}
    both = " and ".join(BACKENDS)
    if not any(found.values()):
        why = _why(groups)
        return f"auto's order: of {both} no pair was measured at B-CAST{f' ({why})' if why else ''}; it stays as it is"
    said = [f"{_WORKS[work]}: {_compared(pairs)}" for work, pairs in found.items()]
    return f"auto's order: B-CAST {'; '.join(said)}; {_advice(found)}"


def _pairs(groups: Mapping[str, Mapping[str, Row]], work: str) -> Iterator[_Pair]:
    """Groups of B-CAST in which both were timed and are right."""
    for title, rows in groups.items():
        subject = title.partition(":")[0]
        timed = [rows[row_of(name)] for name in BACKENDS if _is_timed(rows.get(row_of(name), {}))]
        if not subject.startswith("bcast ") or not subject.endswith(f" {work}") or len(timed) < 2:
            continue
        mode = next((mode for mode in _MODES if all(f"{mode}median_ms" in row for row in timed)), None)
        if mode is not None:
            kind = subject.removeprefix("bcast ").removesuffix(f" {work}")
            yield _Pair(kind, dict(zip(BACKENDS, (row[f"{mode}median_ms"] for row in timed), strict=True)))


def _is_timed(row: Row) -> bool:
    return "failed" not in row and "stand_in" not in row and bool(row.get("correct", True)) and "median_ms" in row


def _mean(pairs: list[_Pair]) -> float:
    """Geometric mean of the ratios."""
    return math.exp(sum(math.log(pair.ratio) for pair in pairs) / len(pairs))


def _compared(pairs: list[_Pair]) -> str:
    if not pairs:
        return "not measured with both"
    first, second = BACKENDS
    each = ", ".join(f"{p.group} {p.ms[second]:.4g} of {p.ms[first]:.4g} ms" for p in pairs)
    return f"{second} needs {_mean(pairs):.2f}x of {first}'s time ({each})"


def _faster(pairs: list[_Pair]) -> str:
    """The backend that is, "" if neither is or nothing was measured."""
    if not pairs or abs(_mean(pairs) - 1) <= _NOISE:
        return ""
    return BACKENDS[_mean(pairs) < 1]


def _advice(found: Mapping[str, list[_Pair]]) -> str:
    faster = {work: _faster(pairs) for work, pairs in found.items()}
    if not all(found.values()):
        return f"{BACKENDS[0]} stays first until both works are measured"
    named = set(faster.values()) - {""}
    if len(named) == 1:
        return f"so auto should take {named.pop()} first"
    if not named:
        return f"they differ by at most {_NOISE:.0%}, so {BACKENDS[0]} stays first"
    told = ", ".join(f"{faster[work]} is faster {_WORKS[work]}" for work in _WORKS)
    return f"{told}, so {BACKENDS[0]} stays first: auto has one order for both"


def _why(groups: Mapping[str, Mapping[str, Row]]) -> str:
    """Why rows of B-CAST have no figure, the first reason of each backend."""
    reasons = []
    for name in BACKENDS:
        named = [rows.get(row_of(name), {}) for title, rows in groups.items() if title.startswith("bcast ")]
        why = next((row[key] for row in named for key in ("failed", "missing", "stand_in") if key in row), "")
        reasons += [f"{name}: {why}"] if why else []
    return "; ".join(reasons)
