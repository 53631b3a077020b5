"""What the CUDA C++ kernels take of a multiprocessor: designs, until compiled numbers stand in their place."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator.targets import TARGETS

#: The architecture of all of them: `wgmma`, TMA and clusters.
HOPPER = TARGETS["sm_90"]
#: Weights of one step of a ring: 192 output channels by 64 input channels, in 16 bits.
COLUMNS, DEPTH = 192, 64
STEP_BYTES = COLUMNS * DEPTH * 2
_BARRIERS = 1024  # bytes of shared memory for mbarriers, rounded up to a swizzle atom


#: (rows of a CTA, bytes of an element of the operand beside the weights) -> steps that a ring holds.
STAGES = {(64, 2): 4, (64, 4): 3, (128, 2): 7, (128, 4): 6}


@dataclass(frozen=True)
class Design:
    """Resources of one kernel."""

    threads: int
    registers: int  # of a thread at launch; setmaxnreg hands them on inside of a CTA
    most: int  # registers of a thread that has the most
    shared: int  # bytes
    known: str  # how the numbers are known
    spills: int = 0  # instructions of a warp that store or load a spilled word

    @property
    def spilled(self) -> int:
        """Bytes that a CTA spills: to L2, since shared memory leaves little of L1."""
        return self.spills * self.threads * 4

    @property
    def per_sm(self) -> int:
        """CTAs that fit a multiprocessor."""
        by_shared = HOPPER.shared_total // (self.shared + HOPPER.shared_reserved)
        by_registers = HOPPER.registers // (self.threads * self.registers)
        by_threads = HOPPER.max_warps * HOPPER.warp_size // self.threads
        return min(by_shared, by_registers, by_threads, HOPPER.max_ctas)


def row(rows: int, stream_bytes: int) -> Design:
    """A row kernel: a producer's warpgroup, and a consumer's for every 64 rows.

    Args:
        rows: 64 or 128.
        stream_bytes: of an element of the operand that comes through the ring beside the weights.
    """
    operand = 2 * rows * DEPTH * stream_bytes  # two steps of it
    shared = STAGES[rows, stream_bytes] * STEP_BYTES + operand + _BARRIERS
    if rows == 64:
        return Design(256, 128, 224, shared, "design; `project` for bf16 compiled in a trial: 221 registers")
    return Design(384, 168, 240, shared, "design")


def attention(queries: int) -> Design:
    """A warp for 16 queries; these, and two stages of 64 keys and values, by 64 channels in 16 bits."""
    return Design(2 * queries, 128, 128, (queries + 2 * 2 * 64) * 64 * 2, "design")


#: 4 warps; queries, keys, values and the output's gradient.
ATTENTION_BACKWARD_SHORT = Design(128, 128, 128, 4 * 64 * 64 * 2, "design")
#: 16 warps; seven tensors of a window and a head, P and dS of half the keys.
ATTENTION_BACKWARD_LONG = Design(512, 128, 128, 7 * 208 * 32 * 2 + 2 * 208 * 104 * 2, "design")
#: Two consumers of 64 x 384 and a producer; three stages of 128 + 384 columns by 64 rows.
WEIGHT_GRADIENT = Design(
    384, 168, 240, 3 * (128 + 384) * 64 * 2 + _BARRIERS, "design; compiled in a trial: 215 registers"
)
#: What moves bytes, and little else.
PLAIN = Design(256, 64, 64, 0, "design")


def table() -> dict[str, Design]:
    """The designs by the kernels that have them."""
    rows = "project, project again, exchange, exchange_backward, project_backward"
    return {
        f"{rows}: {number} rows, {name} operand": row(number, size)
        for number in (64, 128)
        for name, size in (("bf16", 2), ("fp32", 4))
    } | {
        "attention": attention(64), "attention, 128 queries": attention(128),
        "attention_backward s2t": ATTENTION_BACKWARD_LONG, "attention_backward t2s": ATTENTION_BACKWARD_SHORT,
        "weight_gradient": WEIGHT_GRADIENT,
        "prepare, sums": PLAIN,
    }  # fmt: skip
