"""Device functions that the kernels share: the two product shapes of a bottleneck, LayerNorm, GELU, row maps.

Every kernel here is the same sandwich: `narrow` a wide row into the bottleneck, do something that needs the whole
row, `widen` it again. The row of d channels lives in registers as a tuple of CHUNKS tiles [rows, CHUNK], because
Triton's tiles are powers of two and d = 384 is three of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Naming in all kernels: BM rows of a program, BK columns of one step of a contraction, BN columns of one output tile.
# Row numbers are int32, offsets (row times width) int64: 2^31 elements are 2.8 million rows of 768, which 900 clips
# pass, while 2^31 rows would not fit in any memory; and a 64-bit division costs a hundred instructions.


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation. float32 operands are split into three tf32 ones (error near 2^-22).

    AMD's matrix cores multiply float32 itself, and Triton has no tf32x3 for them.
    """
    if a.dtype == tl.float32:
        PRECISION: tl.constexpr = "ieee" if tl.target_info.is_hip() else "tf32x3"
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a, b, acc)


@triton.jit
def odd(number):
    """The number as `launch.as_odd` puts it into tuples."""
    return 2 * number + 3


@triton.jit
def unodd(number):
    """The number that was made odd."""
    return (number - 3) >> 1


@triton.jit
def offset(row, WIDTH: tl.constexpr):
    """Where the rows begin in a matrix of WIDTH columns."""
    return row.to(tl.int64) * WIDTH


@triton.jit
def zeros(BM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The row of d channels, zero, in fp32."""
    row = ()
    for _ in tl.static_range(CHUNKS):
        row += (tl.zeros((BM, CHUNK), tl.float32),)
    return row


@triton.jit
def load_weight(weight, out, inner, OUT: tl.constexpr, INNER: tl.constexpr, IN_BY_OUT: tl.constexpr,
                OUT_EVEN: tl.constexpr, INNER_EVEN: tl.constexpr):  # fmt: skip
    """A tile [inner, out] of a weight that lies as [OUT, INNER], or as [INNER, OUT] where IN_BY_OUT; zero outside."""
    at = inner[:, None] * OUT + out[None, :] if IN_BY_OUT else out[None, :] * INNER + inner[:, None]
    if OUT_EVEN and INNER_EVEN:  # no mask: the tile is inside, and the compiler need not prove it
        return tl.load(weight + at)
    return tl.load(weight + at, mask=(inner < INNER)[:, None] & (out < OUT)[None, :], other=0.0)


@triton.jit
def narrow(
    row, x, rows, mask, weight, WIDTH: tl.constexpr, D: tl.constexpr, IN_BY_OUT: tl.constexpr,
    COMPUTE: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """row + x @ weight^T: WIDTH channels to d. `rows` [BM] are the rows of x [*, WIDTH].

    The weight lies as [D, WIDTH], or as [WIDTH, D] where IN_BY_OUT: the gradient of a layer that widens.
    """
    for k in tl.range(0, WIDTH, BK, num_stages=STAGES):
        inner = k + tl.arange(0, BK)
        if WIDTH % BK == 0:
            a = tl.load(x + offset(rows, WIDTH)[:, None] + inner[None, :], mask=mask[:, None], other=0.0)
        else:
            here = mask[:, None] & (inner < WIDTH)[None, :]
            a = tl.load(x + offset(rows, WIDTH)[:, None] + inner[None, :], mask=here, other=0.0)
        a = a.to(COMPUTE)
        step = ()
        for c in tl.static_range(CHUNKS):
            w = load_weight(weight, channels(c, CHUNK), inner, D, WIDTH, IN_BY_OUT, D % CHUNK == 0, WIDTH % BK == 0)
            step += (dot(a, w.to(COMPUTE), row[c]),)
        row = step
    return row


@triton.jit
def widen(
    row, weight, j, WIDTH: tl.constexpr, D: tl.constexpr, IN_BY_OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Columns j to j + BN of row @ weight^T, [BM, BN] in fp32: d channels to WIDTH.

    The weight lies as [WIDTH, D], or as [D, WIDTH] where IN_BY_OUT.
    """
    out = tl.zeros((BM, BN), tl.float32)
    for c in tl.static_range(CHUNKS):
        w = load_weight(
            weight, j + tl.arange(0, BN), channels(c, CHUNK), WIDTH, D, IN_BY_OUT, WIDTH % BN == 0, D % CHUNK == 0
        )
        out = dot(row[c], w.to(row[c].dtype), out)
    return out


@triton.jit
def channels(c: tl.constexpr, CHUNK: tl.constexpr):
    """The channels of chunk c."""
    return c * CHUNK + tl.arange(0, CHUNK)


@triton.jit
def add_bias(row, bias, mask, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """row + bias [D] where the mask [BM] holds; elsewhere the row is zero and stays it."""
    out = ()
    for c in tl.static_range(CHUNKS):
        at = channels(c, CHUNK)
        value = tl.load(bias + at, mask=at < D, other=0.0).to(tl.float32)
        out += (row[c] + tl.where(mask[:, None], value[None, :], 0.0),)
    return out


@triton.jit
def rounded(row, DTYPE: tl.constexpr, CHUNKS: tl.constexpr):
    """Each chunk in DTYPE."""
    out = ()
    for c in tl.static_range(CHUNKS):
        out += (row[c].to(DTYPE),)
    return out


@triton.jit
def load_chunk(x, rows, mask, c: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of rows of x [*, D], zero where masked, in their dtype."""
    at = channels(c, CHUNK)
    here = mask[:, None] if D % CHUNK == 0 else mask[:, None] & (at < D)[None, :]
    return tl.load(x + offset(rows, D)[:, None] + at[None, :], mask=here, other=0.0)


@triton.jit
def store_chunk(x, rows, mask, value, c: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write chunk c of rows of x [*, D], rounded to its dtype."""
    at = channels(c, CHUNK)
    here = mask[:, None] if D % CHUNK == 0 else mask[:, None] & (at < D)[None, :]
    tl.store(x + offset(rows, D)[:, None] + at[None, :], value.to(x.dtype.element_ty), mask=here)


@triton.jit
def pieces(row, BM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PIECE: tl.constexpr):
    """The row in tiles of PIECE columns, CHUNK or half of it: what is done to less at a time takes fewer registers."""
    out = ()
    for c in tl.static_range(CHUNKS):
        if PIECE == CHUNK:
            out += (row[c],)
        else:
            left, right = tl.split(tl.permute(tl.reshape(row[c], (BM, 2, PIECE)), (0, 2, 1)))
            out += (left, right)
    return out


@triton.jit
def load_row(x, rows, mask, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """All chunks of rows of x."""
    row = ()
    for c in tl.static_range(CHUNKS):
        row += (load_chunk(x, rows, mask, c, D, CHUNK),)
    return row


@triton.jit
def store_row(x, rows, mask, row, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Write all chunks of rows of x."""
    for c in tl.static_range(CHUNKS):
        store_chunk(x, rows, mask, row[c], c, D, CHUNK)


@triton.jit
def statistics(row, eps, BM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and reciprocal deviation of each row, [BM] each. Centred squares: no cancellation."""
    total = tl.zeros((BM,), tl.float32)
    for c in tl.static_range(CHUNKS):
        total += tl.sum(row[c].to(tl.float32), 1)  # channels past D are zero
    mean = total / D
    squares = tl.zeros((BM,), tl.float32)
    for c in tl.static_range(CHUNKS):
        centred = tl.where((channels(c, CHUNK) < D)[None, :], row[c].to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, tl.rsqrt(squares / D + eps)


@triton.jit
def normalised(z, mean, rstd, weight, bias, c: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of LayerNorm's output, fp32; zero past D."""
    at = channels(c, CHUNK)
    w = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=at < D, other=0.0).to(tl.float32)
    return (z.to(tl.float32) - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]


@triton.jit
def gelu(x):
    """Exact GELU, x * Phi(x), of an fp32 tile."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_to_round(x):
    """GELU of an fp32 tile whose result is rounded to 16 bits: 16 instructions an element fewer than by erf.

    max(x, 0) - |x| Q(|x|) with Q = 1 - Phi from Abramowitz and Stegun 7.1.26: at most 2.2e-7 off, and 2e-3 of the value
    down to x = -5, where fp32's 1 + erf has lost as much to cancellation. 1 / y is rsqrt(y)^2, two instructions.
    """
    size = tl.abs(x)
    root = tl.rsqrt(1.0 + 0.23164187 * size)
    t = root * root
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.maximum(x, 0.0) - size * (tail * tl.exp2(x * x * -0.7213475204444817))


@triton.jit
def gelu_gradient(x):
    """Its derivative, Phi(x) + x * phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def patch_row(i, frames, patches, BY_PATCH: tl.constexpr):
    """The row, frame by frame, of the i-th patch in window order: windows of one patch's frames, or whole frames."""
    if BY_PATCH:
        inside = i % (frames * patches)
        return (i // (frames * patches) * frames + inside % frames) * patches + inside // frames
    return i


@triton.jit
def within(key, low, window):
    """Whether each key lies in the window that begins at each row's `low`, [rows, keys]: one unsigned comparison.

    Whole windows fill the rows, so no window reaches past the last one.
    """
    return (key[None, :] - low[:, None]).to(tl.uint32) < window.to(tl.uint32)


@triton.jit
def column_sums(partial, tile, start, width, at, value, mask, D: tl.constexpr):
    """Sums over the program's rows of value [rows, columns], into row `tile` of partial [tiles, width] at start + at.

    `at` below D is kept.
    """
    total = tl.sum(tl.where(mask[:, None], value, 0.0), 0)
    tl.store(partial + tile * width + start + at, total, mask=at < D)
