"""Weight gradients of which several programs take a part of the rows each, and `sum_parts`, which adds the parts up.

The other tests' tiles want one program, so there a gradient is whole in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import adapter_cases
import bcast_cases
import pytest
import torch
from bcast_cases import assert_at_most_twice_eager

from cast_kernels.evidence.cases import poisoned_memory
from cast_kernels.triton import tiles, weight_gradient

TILES = tiles.TileSet(
    "for this test",
    row=tiles.Tile(rows=32, k=32, columns=64, warps=4, stages=1, queries=32, keys=32),
    weight_gradient=tiles.Tile(rows=32, k=16, columns=64, warps=4, stages=1, programs=4),
    attention_backward=tiles.Tile(rows=32, k=32, columns=32, warps=4, stages=1, queries=32, keys=32),
)
#: (problem, its bottleneck, parts), rows in steps of 16: ten layers in 14 tiles, of 44 and 40 rows; ten in ten tiles,
#: whose second part has no row; two in three tiles, of 45 rows, whose fourth part has none.
PROBLEMS = [
    (bcast_cases, bcast_cases.small(frames=2, patches=10, dim=48, bottleneck=32, heads=2, seed=1), 32, 2),
    (bcast_cases, bcast_cases.small(batch=1, frames=2, patches=3, dim=16, bottleneck=16, heads=1, seed=4), 16, 2),
    (adapter_cases, adapter_cases.Case(), 16, 4),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of every launch of `sum_parts`."""
    seen: list[int] = []
    true = weight_gradient.sum_parts

    class Watched:
        arg_names = true.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                seen.append(arguments[-2])
                true[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(weight_gradient, "sum_parts", Watched())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case", "d", "parts"), PROBLEMS, ids=["bcast", "few rows", "adapter"])
def test_parts_of_the_rows_add_up(
    op: ModuleType, case: Any, d: int, parts: int, dtype: torch.dtype, launched: list[int]
) -> None:
    with tiles.trying("interpreter", 8 * dtype.itemsize, d, TILES):
        ours = op.run(case, dtype, "triton")
    assert launched == [parts]
    assert_at_most_twice_eager(ours, op.run(case, dtype, "eager"), op.run(case, torch.float64, None))
