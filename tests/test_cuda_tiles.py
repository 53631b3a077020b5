"""How the row kernels' tiles are laid over CTAs: the decision by hand, and that no bit of a result depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_cases import ODD, call, multiprocessors, needs_kernels

from cast_kernels import _native
from cast_kernels.evidence.cuda_launches import emulated, kept
from cast_kernels.evidence.cuda_model import rows
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes

pytestmark = needs_kernels

#: 261 and 232 rows, two clusters of tiles and one; three units of `project`'s columns, two of `exchange`'s.
CASE = replace(ODD, batch=1, frames=29, patches=8, dim=200, scaled=True)
#: Multiprocessors that compute one of these clusters at once, two or all: no rows share columns, the last, or all.
NOBODY, LAST, ALL = 4, 8, 132


def tiles(
    count: tuple[int, int], units: int, narrow: int, unit: int = 6, multiprocessors: int = 132
) -> list[list[int]]:  # fmt: skip
    """Of each stream: CTAs, those with all columns, how many share the others'."""
    return _native.cuda().row_tiles(count, (units, units), narrow, unit, multiprocessors)  # type: ignore[no-any-return]


def test_what_fills_no_round_shares_columns() -> None:
    """Six clips: 148 + 147 tiles are 37 + 37 clusters; 33 at once leave eight.

    `project` has 24 steps and six units of six: three shares end after 36 steps, one after 60. `exchange` has 12 and
    four units: four shares of eight clusters are 32, one round. `exchange_backward` has 24 and two units.
    """
    assert tiles((148, 147), 6, 24) == [[148, 148, 3], [116 + 3 * 32, 116, 3]]
    assert tiles((148, 147), 4, 12) == [[148, 148, 4], [116 + 4 * 32, 116, 4]]
    assert tiles((148, 147), 2, 24) == [[148, 148, 2], [116 + 2 * 32, 116, 2]]


def test_nothing_is_shared_where_it_ends_no_sooner() -> None:
    """32 clips leave 27 of 33 clusters; whole rounds leave none; a product of one unit has nothing to share."""
    assert tiles((1576, 1568), 6, 24) == [[1576, 1576, 1], [1568, 1568, 1]]
    assert tiles((132, 132), 6, 24) == [[132, 132, 1], [132, 132, 1]]
    assert tiles((25, 25), 1, 24) == [[28, 28, 1], [28, 28, 1]]


def test_few_tiles_are_all_shared_and_absent_streams_have_none() -> None:
    """One clip: seven clusters of each stream; two shares of 14 are 28 of 33. One way: as many as units."""
    assert tiles((25, 25), 6, 24) == [[56, 0, 2], [56, 0, 2]]
    assert tiles((0, 25), 4, 12) == [[0, 0, 4], [28 * 4, 0, 4]]
    assert _native.cuda().row_tiles((1, 1), (2, 4), 24, 6, 132) == [[8, 0, 2], [16, 0, 4]]
    assert tiles((5, 0), 6, 24, multiprocessors=1) == [[8, 8, 1], [0, 0, 1]]  # one cluster at once: no round is short


@pytest.mark.parametrize("batch", [1, 6, 7, 32])
def test_the_model_shares_as_the_kernels_do(batch: int) -> None:
    sizes, count = Sizes(batch), []
    for stream_rows in sizes.rows.values():
        count.append(-(-stream_rows // 64))
    for kernel, units, narrow in ((rows.project, 6, 24), (rows.project_backward, 4, 36)):
        launch = kernel(sizes, Choice(split_tail=True))
        assert launch.count == sum(own[0] for own in tiles((count[0], count[1]), units, narrow))


def test_the_grids_are_those() -> None:
    """Twelve CTAs; four of them twice; each three times, or twice where there are two units."""
    grids = {}
    for number in (NOBODY, LAST, ALL):
        with kept() as launches:
            call(CASE, "bf16", "nothing").forward(number)
        grids[number] = [one.grid[0] for one in launches if one.cluster == 4]
    assert grids == {NOBODY: [12, 12], LAST: [16, 16], ALL: [36, 24]}


def words(kind: str, number: int) -> list[torch.Tensor]:
    made = call(CASE, kind, "nothing")
    with emulated():
        made.forward(number)
    return [made.y[0].view(torch.uint8), made.y[1].view(torch.uint8), made.saved]


def test_no_bit_of_a_forward_depends_on_it() -> None:
    for one, other in zip(words("amp", NOBODY), words("amp", LAST), strict=True):
        assert torch.equal(one, other)


@pytest.mark.heavy
def test_no_bit_of_the_streams_gradients_depends_on_it() -> None:
    """Those of parameters are added in parts, as many as there are multiprocessors; so they are frozen here.

    16 multiprocessors compute four clusters at once: two shares each.
    """
    case = replace(
        CASE, frames=1, patches=9, bottleneck=384, heads=12, directions=("t2s",), recompute="nothing", backward=True
    )
    found, grids = [], []
    for number in (NOBODY, 16):
        module = case.module(torch.float32, "cuda").requires_grad_(False)
        streams = case.inputs(torch.float32, grad=True)
        with multiprocessors(number), emulated() as ran, torch.autocast("cpu", torch.bfloat16):
            torch.autograd.backward(module(*streams, *case.scales()), case.output_grads(torch.float32))
        found.append([x.grad for x in streams])
        grids.append([one.launch.grid[0] for one in ran if one.launch.cluster == 4])
    assert grids == [[8, 4, 4, 8], [16, 8, 8, 16]]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]
