"""setmaxnreg: warpgroups hand registers to each other, and an account of those that the CTA has.

Source: PTX ISA, "Miscellaneous Instructions: setmaxnreg". A kernel starts with the registers that ptxas counts; PTX
says what it may count at most: `.maxnreg`, or the launch bounds, by which the register file of an SM is divided.
"""

from dataclasses import dataclass

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, wait
from ptx_emulator.core.errors import Divergence, EmulationError, Unsupported
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import Part, State, Wait
from ptx_emulator.core.syntax import Instruction, Literal

FILE = 65536  # 32-bit registers of an SM
GROUP = 128  # threads of a warpgroup
UNIT = 8  # registers a thread are given out in eights


def at_entry(kernel: Kernel) -> int | None:
    """Registers a thread that the kernel starts with, None where PTX sets no bound: ptxas then ignores setmaxnreg."""
    if kernel.max_registers is not None:
        return kernel.max_registers // UNIT * UNIT
    threads = kernel.required_threads or kernel.max_threads
    if threads is None:
        return None
    return min(255, FILE // (threads * (kernel.min_ctas or 1))) // UNIT * UNIT


class RegisterFile(Part):
    """Registers a thread of each warpgroup of each CTA."""

    def __init__(self, m: State) -> None:
        self.start: int = at_entry(m.kernel) or 0
        self.held: Array = np.full((m.ctas, m.threads // GROUP), self.start, np.int64)
        self.wanted: Array = np.zeros_like(self.held)  # by warpgroups that sleep

    def may_part(self) -> bool:
        """Not with an account for each CTA."""
        return False

    def settle(self, m: State) -> None:
        """Let warpgroups have what they wait for, where the CTA has it left."""
        pool = self.start * self.held.shape[1]
        for cta, group in zip(*np.nonzero(self.wanted), strict=True):
            if self.held[cta].sum() - self.held[cta, group] + self.wanted[cta, group] > pool:
                continue
            self.held[cta, group] = self.wanted[cta, group]
            self.wanted[cta, group] = 0
            lanes = np.zeros(m.shape, bool)
            lanes[cta, GROUP * group : GROUP * (group + 1)] = True
            m.wake(lanes)


def _whole_groups(m: State, mask: Array | None, text: str) -> Array:
    """The warpgroups that execute, (CTAs, warpgroups)."""
    if m.threads % GROUP:
        raise Divergence(f"{m.threads} threads are no whole number of warpgroups: {text}")
    lanes = np.broadcast_to(True if mask is None else mask, m.shape).reshape(m.ctas, -1, GROUP)
    if (lanes.any(2) != lanes.all(2)).any():
        raise Divergence(f"reached by some threads of a warpgroup only: {text}")
    return np.any(lanes, axis=2)


def _count(ins: Instruction) -> int:
    value = int(ins.operands[0].text, 0) if isinstance(ins.operands[0], Literal) else 0
    if not 24 <= value <= 256 or value % UNIT:
        raise Unsupported(f"unsupported: {ins.text}: a multiple of {UNIT} from 24 to 256")
    return value


def _read(ins: Instruction) -> tuple[str | None, int]:
    mods = Modifiers(ins)
    kind = mods.take("inc", "dec")
    mods.drop("sync", "aligned", "u32")
    mods.end()
    return kind, _count(ins)


def _account(m: State, number: int) -> RegisterFile | None:
    """The batch's account, made at the first use; None, with a finding, where there is no count to start from."""
    if at_entry(m.kernel) is None:
        if m.checker is not None:
            m.checker.note("setmaxnreg is ignored: the kernel has neither launch bounds nor .maxnreg", number, number)
        return None
    return m.of(RegisterFile)


@dataclass
class Increase(Wait):
    """`setmaxnreg.inc` waits until the other warpgroups have given enough registers back."""

    registers: int

    def enter(self, m: State, lanes: Array) -> Array:
        """Ask; `settle` answers, perhaps at once."""
        groups = _whole_groups(m, lanes, self.text)
        account = _account(m, self.at)
        if account is None:
            return np.zeros(m.shape, bool)
        if (account.held[groups] > self.registers).any():
            raise EmulationError(
                f"{self.text} asks for fewer registers than the {int(account.held[groups].max())} a thread has"
            )
        account.wanted[groups] = self.registers
        return lanes

    def tell(self, m: State, lanes: Array) -> str:
        """The account, for a report of a deadlock."""
        cta = int(np.flatnonzero(lanes.any(1))[0])
        account = m.of(RegisterFile)
        held = account.held[cta]
        have = " + ".join(map(str, held))
        wanted = int((account.wanted[cta] > 0).sum())
        return (
            f"`{self.text}` in CTA {int(m.cta_numbers[cta])}: {wanted} warpgroups wait for {self.registers} registers "
            f"a thread, the warpgroups have {have} of {account.start} x {len(held)}"
        )


@wait("setmaxnreg")
def build_increase(d: Decoder, ins: Instruction) -> Increase | None:
    """`setmaxnreg.inc`; a decrease waits for nobody."""
    kind, registers = _read(ins)
    return Increase(d.current, ins.text, registers) if kind == "inc" else None


@instruction("setmaxnreg")
def build_decrease(d: Decoder, ins: Instruction) -> Action | None:
    kind, registers = _read(ins)
    if kind != "dec":
        raise Unsupported(f"unsupported: {ins.text}")
    number, text = d.current, ins.text

    def decrease(m: State, mask: Array | None) -> None:
        groups = _whole_groups(m, mask, text)
        account = _account(m, number)
        if account is None:
            return
        if (account.held[groups] < registers).any():
            raise EmulationError(
                f"{text} asks for more registers than the {int(account.held[groups].min())} a thread has"
            )
        account.held[groups] = registers

    return decrease
