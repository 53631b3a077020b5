"""Triton kernels for the emulator's tests, and a command that compiles them: `python ptx_triton_kernels.py OUT.json`.

A process of its own, because Triton decides at import whether it interprets or compiles.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90)


@triton.jit
def matmul(
    a,
    b,
    c,
    m,
    n,
    k,
    lda,
    ldb,
    ldc,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TA: tl.constexpr,
    TB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, columns, inner = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * BN + tl.arange(0, BN),
        tl.arange(0, BK),
    )
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, k, BK):
        i = start + inner
        in_a, in_b = (rows[:, None] < m) & (i[None, :] < k), (columns[None, :] < n) & (i[:, None] < k)
        at_a = i[None, :] * lda + rows[:, None] if TA else rows[:, None] * lda + i[None, :]
        at_b = columns[None, :] * ldb + i[:, None] if TB else i[:, None] * ldb + columns[None, :]
        total = tl.dot(
            tl.load(a + at_a, mask=in_a, other=0.0),
            tl.load(b + at_b, mask=in_b, other=0.0),
            total,
            input_precision=PRECISION,
        )
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * ldc + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def softmax(x, y, m, n, stride, BM: tl.constexpr, BN: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    at = rows[:, None] * stride + columns[None, :]
    value = tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 1)[:, None])
    tl.store(y + at, (power / tl.sum(power, 1)[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def layernorm_gelu(x, w, y, m, n, stride, eps, BM: tl.constexpr, BN: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    at = rows[:, None] * stride + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(columns[None, :] < n, value - (tl.sum(value, 1) / n)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / n + eps)
    z = centred * scale[:, None] * tl.load(w + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, (0.5 * z * (1 + tl.erf(z * 0.7071067811865476))).to(y.dtype.element_ty), mask=inside)


@triton.jit
def attention(q, k, v, o, n, stride, scale, BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr):
    rows, d, head = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, D), tl.program_id(1)
    queries = tl.load(q + rows[:, None] * stride + head * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    top, length, total = (
        tl.full((BQ,), -float("inf"), tl.float32),
        tl.zeros((BQ,), tl.float32),
        tl.zeros((BQ, D), tl.float32),
    )
    for start in range(0, n, BK):
        i = start + tl.arange(0, BK)
        keys = tl.load(k + i[None, :] * stride + head * D + d[:, None], mask=i[None, :] < n, other=0.0)
        values = tl.load(v + i[:, None] * stride + head * D + d[None, :], mask=i[:, None] < n, other=0.0)
        score = tl.where(i[None, :] < n, tl.dot(queries, keys) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        power, shrink = tl.exp2(score - new[:, None]), tl.exp2(top - new)
        length, top = length * shrink + tl.sum(power, 1), new
        total = tl.dot(power.to(values.dtype), values, total * shrink[:, None])
    tl.store(
        o + rows[:, None] * stride + head * D + d[None, :],
        (total / length[:, None]).to(o.dtype.element_ty),
        mask=rows[:, None] < n,
    )


@triton.jit
def one_problem(a, b, c, tile, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, inner = tile * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        i = start + inner
        left = tl.load(a + rows[:, None] * k + i[None, :], mask=rows[:, None] < m, other=0.0)
        total = tl.dot(left, tl.load(b + i[:, None] * n + columns[None, :]), total)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty), mask=rows[:, None] < m)


@triton.jit
def two_problems(
    a, b, c, d, m, m2, n, k, k2, first, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # d = [m, n] rows, then [m2, n] rows
    tile = tl.program_id(0)
    if tile >= first + tl.cdiv(m2, BM):
        return
    if tile < first:
        one_problem(a, c, d, tile, m, n, k, BM, BN, BK)
    else:
        one_problem(b, c, d + m * n, tile - first, m2, n, k2, BM, BN, BK)


def cases() -> dict[str, tuple]:
    """name -> (kernel, types of the run-time arguments, constants, names that are multiples of 16, warps, stages)."""
    sizes = dict.fromkeys(("m", "n", "k", "lda", "ldb", "ldc"), "i32")
    found = {}
    for kind, ta, tb, precision, warps in (
        ("bf16", False, False, "tf32", 4),
        ("bf16", True, True, "tf32", 4),
        ("fp16", False, True, "tf32", 8),
        ("fp32", False, False, "tf32", 4),
        ("fp32", False, True, "tf32x3", 4),
    ):
        constants = {"BM": 64, "BN": 64, "BK": 32, "TA": ta, "TB": tb, "PRECISION": precision}
        divisible = (
            ["a", "b", "c", "n", "k", "lda", "ldb", "ldc"] if not ta else ["a", "b", "c", "n", "k", "ldb", "ldc"]
        )
        types = {"a": f"*{kind}", "b": f"*{kind}", "c": f"*{kind}", **sizes}
        found[f"matmul {kind} {int(ta)}{int(tb)} {precision}"] = (matmul, types, constants, divisible, warps, 3)
    row = {"m": "i32", "n": "i32", "stride": "i32"}
    blocks = {"BM": 4, "BN": 256}
    found["softmax fp16"] = (softmax, {"x": "*fp16", "y": "*fp16", **row}, blocks, ["x", "y"], 4, 1)
    types = {"x": "*bf16", "w": "*bf16", "y": "*bf16", **row, "eps": "fp32"}
    found["layernorm_gelu bf16"] = (layernorm_gelu, types, blocks, ["x", "w", "y", "stride"], 8, 1)
    pointers = dict.fromkeys("qkvo", "*bf16")
    types = {**pointers, "n": "i32", "stride": "i32", "scale": "fp32"}
    found["attention bf16"] = (attention, types, {"BQ": 64, "BK": 64, "D": 32}, [*pointers, "stride"], 4, 2)
    pointers = dict.fromkeys("abcd", "*bf16")
    types = {**pointers, **dict.fromkeys(("m", "m2", "n", "k", "k2", "first"), "i32")}
    found["two_problems bf16"] = (
        two_problems,
        types,
        {"BM": 64, "BN": 64, "BK": 32},
        [*pointers, "n", "k", "k2"],
        4,
        3,
    )
    return found


def compile_case(case: tuple, target: int) -> dict:
    """PTX, entry name, shared bytes and threads."""
    kernel, types, constants, divisible, warps, stages = case
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    done = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return {"ptx": done.asm["ptx"], "name": done.metadata.name, "shared": done.metadata.shared, "threads": 32 * warps}


if __name__ == "__main__":
    compiled = {
        f"{name} sm_{target}": compile_case(case, target) for name, case in cases().items() for target in TARGETS
    }
    with open(sys.argv[1], "w") as file:
        json.dump(compiled, file)
