"""Fences that make relaxed arrivals and waits into releases and acquires."""

import pytest
from test_ptx_barriers import PRODUCER, go, init, kinds, wait
from test_ptx_clusters import FIRST, REMOTE, SYNC, WAIT
from test_ptx_clusters import go as go_cluster

RELAXED = "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r9];"
RELAXED_WAIT = wait(0).replace("parity.", "parity.relaxed.cta.")


@pytest.mark.parametrize("fence", ["fence.acq_rel.cta;", "fence.sc.gpu;", "membar.gl;", "membar.cta;"])
def test_a_fence_beside_a_relaxed_arrival_and_wait(fence: str) -> None:
    arrive = fence + RELAXED
    assert not go(init(32) + PRODUCER.format(wait=wait(0), arrive=arrive))[1].faults
    assert not go(init(32) + PRODUCER.format(wait=RELAXED_WAIT + fence, arrive=arrive))[1].faults
    assert kinds(go(init(32) + PRODUCER.format(wait=fence + RELAXED_WAIT, arrive=arrive))[1]) == {"write-read"}
    assert kinds(go(init(32) + PRODUCER.format(wait=wait(0), arrive=RELAXED + fence))[1]) == {"write-read"}


def test_a_fence_of_the_cta_does_not_reach_a_peer() -> None:
    arrive = REMOTE.replace("release", "relaxed")
    code = FIRST + "st.shared::cluster.b32 [%r7], %tid0;{0}" + arrive + WAIT + "ld.shared.b32 %r1, [%r8];" + SYNC
    assert not kinds(go_cluster(code.replace("{0}", "fence.acq_rel.cluster;"))[1])
    assert kinds(go_cluster(code.replace("{0}", "fence.acq_rel.cta;"))[1]) == {"write-read"}


def test_inits_behind_their_fence_are_visible_after_a_relaxed_barrier() -> None:
    code = FIRST.replace("arrive.release", "arrive.relaxed") + REMOTE + WAIT + SYNC
    assert not go_cluster(code)[1].faults
    without = code.replace("fence.mbarrier_init.release.cluster;", "")
    assert kinds(go_cluster(without)[1]) == {"mbarrier used before its init is visible"}
