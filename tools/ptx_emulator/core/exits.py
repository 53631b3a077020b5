"""What must be known to a CTA before it leaves."""

import numpy as np

from ptx_emulator.core.clocks import ClusterChecker
from ptx_emulator.core.forms.mbarriers import MBarriers
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State


def check_exits(m: State, ended: Array) -> None:
    """The CTAs `ended` have just left: what peers did to their memory, and copies into it, must be known to them."""
    checker = m.checker
    if not isinstance(checker, ClusterChecker):
        return
    for cta in np.flatnonzero(ended).tolist():
        cluster, first = cta // m.cluster, cta % m.cluster * m.warps
        known = checker.seen[cluster, first : first + m.warps].max(0)
        late = np.flatnonzero(checker.remote[cta] > known[: checker.remote.shape[1]])
        late = late[(late < first) | (late >= first + m.warps)]
        for agent in late[:1].tolist():
            number = m.trace[int(checker.remote[cta, agent])]
            checker.note("CTA ends while a peer may still reach into its memory", number, number, cta)
        for (owner, _), b in m.of(MBarriers).all.items():
            if owner == cta and b.landed > int(known[b.agent]):
                number = m.trace[b.landed]
                checker.note("CTA ends while a copy into its memory may be in flight", number, number, cta)
                break
