"""A Gluon kernel for tests of the PTX emulator: two CTAs share a tile by multicast, with maps that the kernel makes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import cluster, mbarrier, tma, warpgroup_mma

ROWS, COLUMNS, DEPTH = 256, 128, 64  # of a tile; a CTA has half of the rows
SPLIT, SHARED = [[1, 0]], [[0, 0]]  # by rows between the CTAs; the same for both


@gluon.jit
def product(
    x,
    w,
    y,
    depth,
    rows,
    x_layout: gl.constexpr,
    w_layout: gl.constexpr,
    sums: gl.constexpr,
    out_layout: gl.constexpr,
    told: gl.constexpr,
    freed: gl.constexpr,
):
    """y[rows, 128] = x[rows, depth] w[128, depth]'. told: the CTAs meet after init; freed: before the next copy."""
    tile = gl.program_id(0)
    x_map = tma.make_tensor_descriptor(
        x, shape=[rows, depth], strides=[depth, 1], block_shape=[256, 64], layout=x_layout
    )
    w_map = tma.make_tensor_descriptor(
        w, shape=[128, depth], strides=[depth, 1], block_shape=[128, 64], layout=w_layout
    )
    x_tile = gl.allocate_shared_memory(gl.bfloat16, [256, 64], x_layout)
    w_tile = gl.allocate_shared_memory(gl.bfloat16, [128, 64], w_layout)
    full = mbarrier.allocate_mbarrier()
    mbarrier.init(full, count=1)
    if told:
        cluster.barrier()
    total = gl.zeros([256, 128], gl.float32, sums)
    phase = 0
    for first in range(0, depth, 64):
        mbarrier.expect(full, x_map.nbytes_per_cta + w_map.nbytes_per_cta)
        tma.async_load(x_map, [tile * 256, first], full, x_tile)
        tma.async_load(w_map, [0, first], full, w_tile, multicast=True)
        mbarrier.wait(full, phase)
        phase ^= 1
        total = warpgroup_mma(x_tile, w_tile.permute((1, 0)), total)
        if freed:
            cluster.barrier()
    out = gl.convert_layout(total, out_layout)
    row = tile * 256 + gl.arange(0, 256, gl.SliceLayout(1, out_layout))
    column = gl.arange(0, 128, gl.SliceLayout(0, out_layout))
    gl.store(y + row[:, None] * 128 + column[None, :], out.to(gl.bfloat16), mask=(row < rows)[:, None])


def layouts() -> dict[str, object]:
    """The kernel's layouts, by parameter."""
    return {
        "x_layout": gl.NVMMASharedLayout(128, 16, 2, cga_layout=SPLIT),
        "w_layout": gl.NVMMASharedLayout(128, 16, 2, cga_layout=SHARED),
        "sums": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16], cga_layout=SPLIT),
        "out_layout": gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0], cga_layout=SPLIT),
    }


def source(told: bool, freed: bool) -> GluonASTSource:
    """What `triton.compile` takes."""
    fixed = {**layouts(), "told": told, "freed": freed}
    kinds = {"x": "*bf16", "w": "*bf16", "y": "*bf16", "depth": "i32", "rows": "i32"}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    constants = {(len(kinds) + i,): value for i, value in enumerate(fixed.values())}
    return GluonASTSource(product, {**kinds, **dict.fromkeys(fixed, "constexpr")}, constants, divisible)
