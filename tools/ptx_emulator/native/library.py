"""The compiled vector machine of `csrc/ptx`, or why there is none."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ptx_emulator.core.findings import NOTES

NONE = -(1 << 31)  #: no operand
WORDS = 16  #: 32-bit words of an operation, of which OPERANDS are for its handler
OPERANDS = 11
#: Counters in the order in which the machine keeps them; tensor-core kinds follow.
COUNTERS = (
    "global_load_sectors",
    "global_load_bytes",
    "global_load_requests",
    "global_store_sectors",
    "global_store_bytes",
    "global_store_requests",
    "shared_load_wavefronts",
    "shared_load_wavefronts_ideal",
    "shared_load_bytes",
    "shared_load_requests",
    "shared_store_wavefronts",
    "shared_store_wavefronts_ideal",
    "shared_store_bytes",
    "shared_store_requests",
    "async_copy_bytes",
    "barriers",
    "warp_instructions",
)
#: Kinds of findings in the order of the machine's numbers.
KINDS = (
    "write-read",
    "write-write",
    "read-write",
    "read of a copy in flight",
    "write to a copy in flight",
    "write to an operand of a pending wgmma",
    "write-read by wgmma",
    "wgmma reads a copy in flight",
    "wgmma reads a write without fence.proxy.async",
    "register of a pending wgmma used",
    "input register of a pending wgmma overwritten",
    "wgmma register written after the last wgmma.fence",
    *NOTES,
)
FINDING_WORDS = 8  #: kind, instruction, other instruction, granule, the other's warp, warp, CTA, epoch
BLOCK_WORDS = (
    10  #: first operation, their number, instructions, end, target, guard, negated, steps, their list, together
)
MOST_STEPS = 1 << 22  #: accesses to shared memory of a CTA that the machine keeps track of by itself
FINISHED, AT_BLOCK, APART, FAILED = range(4)  #: how far a CTA went alone
NEXT, JUMP, LEAVE, BARRIER = range(4)  #: ends of blocks
CTA_OF_FINDING = 6
MOST_FINDINGS = 4096


class Batch(ctypes.Structure):
    """What the machine knows of a batch: `Batch` in csrc/ptx/machine.h."""

    _fields_ = [
        *((name, c_int64) for name in ("ctas", "threads")),
        *(("registers", c_void_p), ("register_bytes", c_int64), ("constants", c_void_p)),
        *(("heap", c_void_p), ("buffers", c_int64), ("starts", c_void_p), ("stops", c_void_p)),
        *(("shared", c_void_p), ("shared_stride", c_int64), ("shared_end", c_int64)),
        *(("parameters", c_void_p), ("parameter_bytes", c_int64), ("bank", c_void_p), ("bank_bytes", c_int64)),
        *((name, c_int64) for name in ("checks", "granule", "granules")),
        *(("tags", c_void_p), ("seen", c_void_p), ("floor", c_int64), ("trace", c_void_p)),
        *(("most_steps", c_int64), ("epochs", c_void_p)),
        *((name, c_void_p) for name in ("operands", "operand", "all_operands", "fence")),
        *(("findings", c_void_p), ("most_findings", c_int64), ("found", c_int64)),
        *(("counters", c_void_p), ("extra", c_void_p), ("copies", c_void_p), ("products", c_void_p)),
        *((name, c_int64) for name in ("cta_failed", "op_failed", "block", "step")),
        ("at", c_void_p),
    ]


class NotBuilt(ImportError):
    """There is no vector machine that loads; the message says how to build it."""


BUILD = (
    "it is built with the native core, by CAST_KERNELS_BUILD_CPU=1 pip install -v --no-deps --force-reinstall . "
    "in a checkout, which says what fails"
)


class Library:
    """The functions of the compiled machine, and the number of each handler."""

    level: str  #: of instruction sets, which it uses
    run: Callable[..., int]
    walk: Callable[..., int]
    product: Callable[..., None]
    operand: Callable[..., None]
    copies: Callable[..., int]
    forget: Callable[..., None]
    flying: Callable[..., int]
    take: Callable[..., None]
    products: Callable[..., int]
    drop: Callable[..., None]
    idle: Callable[..., int]

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NotBuilt(
                f"engine='native' needs the vector machine, which does not load ({error}); {BUILD}"
            ) from error
        library.ptx_level.restype = library.ptx_handler.restype = c_char_p
        library.ptx_handler.argtypes = [c_int64]
        library.ptx_run.argtypes = [POINTER(Batch), c_void_p, c_int64, c_void_p, c_int64]
        library.ptx_run.restype = c_int
        library.ptx_walk.argtypes = [POINTER(Batch), c_void_p, c_int64, c_void_p, c_int64]
        library.ptx_walk.restype = c_int
        library.ptx_take.argtypes, library.ptx_take.restype = [c_void_p, c_void_p, c_int64, c_int64], None
        library.ptx_product.argtypes, library.ptx_product.restype = [POINTER(Batch), c_void_p], None
        library.ptx_operand.argtypes = [POINTER(Batch), c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int]
        library.ptx_operand.restype = None
        library.ptx_copies.argtypes, library.ptx_copies.restype = [c_int64, c_int64], c_void_p
        library.ptx_forget.argtypes, library.ptx_forget.restype = [c_void_p], None
        library.ptx_flying.argtypes, library.ptx_flying.restype = [c_void_p], c_int64
        self.run, self.copies, self.forget = library.ptx_run, library.ptx_copies, library.ptx_forget
        self.flying, self.operand = library.ptx_flying, library.ptx_operand
        self.walk, self.take = library.ptx_walk, library.ptx_take
        library.ptx_products.argtypes = [c_int64, c_int64, c_void_p, c_int64]
        library.ptx_products.restype = c_void_p
        library.ptx_drop.argtypes, library.ptx_drop.restype = [c_void_p], None
        library.ptx_idle.argtypes, library.ptx_idle.restype = [c_void_p], c_int
        self.products, self.drop, self.idle = library.ptx_products, library.ptx_drop, library.ptx_idle
        self.product = library.ptx_product
        library.ptx_bytes.restype = c_int64
        if library.ptx_bytes() != ctypes.sizeof(Batch):
            raise NotBuilt(f"{path} is of another version of these sources; {BUILD}")
        self.level = library.ptx_level().decode()
        self.codes: dict[str, int] = {}
        while (name := library.ptx_handler(len(self.codes))) is not None:
            assert name.decode() not in self.codes, name
            self.codes[name.decode()] = len(self.codes)


@cache
def library() -> Library:
    """The compiled machine.

    Raises:
        NotBuilt: there is none beside this module.
    """
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_machine{suffix}"
        if path.is_file():
            return Library(path)
    raise NotBuilt(f"engine='native' needs the vector machine, but there is none in {folder}; {BUILD}")
