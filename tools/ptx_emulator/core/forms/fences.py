"""fence and membar. Source: PTX ISA, "membar, fence" and "Memory Consistency Model: Release and Acquire Patterns".

Memory is sequential here, so a fence changes no value: it changes what the checks know to be ordered.
"""

from collections.abc import Callable

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.forms.loads import effective
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import Instruction
from ptx_emulator.core.tensor_maps import ChangedMaps

SCOPES = {"cta": "cta", "cluster": "cluster", "gpu": "gpu", "sys": "sys", "gl": "gpu"}


@instruction("fence", "membar")
def build_fence(d: Decoder, ins: Instruction) -> Action | None:
    if "proxy" in ins.modifiers:
        return _proxy(d, ins)
    mods = Modifiers(ins)
    if mods.take("mbarrier_init"):
        mods.drop("release", "cluster")
        mods.end()
        return _told(d, lambda checker, mask: checker.init_fence(mask))
    scope = SCOPES[mods.take(*SCOPES) or "sys"]
    if ins.root == "fence" and not mods.take("sc", "acq_rel"):
        raise Unsupported(f"unsupported: {ins.text}")
    mods.end()
    return _told(d, lambda checker, mask: checker.memory_fence(mask, scope))


def _told(d: Decoder, tell: Callable[[ClusterChecker, Array | None], None]) -> Action:
    """Tell the checker that knows clocks."""
    number = d.current

    def fence(m: State, mask: Array | None) -> None:
        if isinstance(m.checker, ClusterChecker):
            m.tick(number)
            tell(m.checker, mask)

    return fence


def _proxy(d: Decoder, ins: Instruction) -> Action:
    """Between accesses by ordinary instructions and by the async proxy."""
    if "tensormap::generic" in ins.modifiers:
        return _map_fence(d, ins)
    if not any(modifier.startswith("async") for modifier in ins.modifiers):
        raise Unsupported(f"unsupported: {ins.text}")
    number = d.current

    def fence(m: State, mask: Array | None) -> None:
        m.tick(number)
        if m.checker is not None:
            m.checker.proxy_fence(mask)

    return fence


def _map_fence(d: Decoder, ins: Instruction) -> Action:
    """Behind a change of a tensor map: a release needs no more; an acquire names the map that the CTA may use then."""
    if "acquire" not in ins.modifiers:
        return lambda m, mask: None
    base, offset, _ = d.address(ins.operands[0], ins)
    number = d.current

    def fence(m: State, mask: Array | None) -> None:
        m.tick(number)
        addresses = m.full(effective(m, base, offset))
        for cta, lanes in enumerate(np.broadcast_to(True if mask is None else mask, m.shape)):
            for address in np.unique(addresses[cta][lanes]).tolist():
                m.of(ChangedMaps).fenced[cta, address] = m.step

    return fence
