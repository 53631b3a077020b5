"""Clusters: ranks, memory of a peer, the barrier of a cluster, arrivals from afar, and what ends too early."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

OUTSIDE = ".shared .align 16 .b8 tile[512];\n.shared .align 8 .b8 bar[16];\n"
#: %r9: the tile, %r10: the barrier, %r8: the thread's word, %r2: the rank, %r3: the peer's, %r7: the word there
SETUP = (
    "mov.b32 %r9, tile; mov.b32 %r10, bar; mad.lo.u32 %r8, %tid0, 4, %r9; mov.u32 %r2, %cluster_ctarank; "
    "xor.b32 %r3, %r2, 1; mapa.shared::cluster.u32 %r7, %r8, %r3; mapa.shared::cluster.u32 %r6, %r10, %r3; "
    "setp.eq.u32 %p2, %tid0, 0; setp.eq.u32 %p3, %r2, 0; mov.b32 %r1, 0; mov.u32 %r5, %ctaid.x;"
)
STORE = "mad.lo.u32 %r11, %r5, 32, %tid0; mad.wide.u32 %d32, %r11, 4, %ptr0; st.global.b32 [%d32], %r1;"
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
FIRST = "@%p2 mbarrier.init.shared::cta.b64 [%r10], 32; fence.mbarrier_init.release.cluster;" + SYNC
LANES = np.arange(32)


def go(code: str, *, grid: int = 2, clusters: int = 2, **options: object) -> tuple[np.ndarray, ptx_emulator.Report]:
    out = np.zeros(32 * grid, np.uint32)
    text = entry(
        SETUP + code + STORE, 1, outside=OUTSIDE, directives=f".explicitcluster\n.reqnctapercluster {clusters}\n"
    )
    report = run(text, [out], grid=grid, **options)
    return out.reshape(grid, 32), report


def kinds(report: ptx_emulator.Report) -> set[str]:
    return {fault.kind for fault in report.faults}


def test_ranks_and_sizes() -> None:
    """A grid of 4 x 2 in clusters of 2 x 2: the value packs what each register says."""
    code = "".join(
        f"mov.u32 %r12, %{name}; shl.b32 %r1, %r1, 4; or.b32 %r1, %r1, %r12;"
        for name in (
            "cluster_ctarank",
            "cluster_nctarank",
            "clusterid.x",
            "cluster_ctaid.x",
            "cluster_ctaid.y",
            "nclusterid.x",
            "cluster_nctaid.y",
        )
    )
    code = "mov.u32 %r13, %ctaid.y; mad.lo.u32 %r5, %r13, 4, %r5;" + code
    out = np.zeros(32 * 8, np.uint32)
    kernel = ptx_emulator.parse(entry(SETUP + code + STORE, 1, outside=OUTSIDE)).kernels["f"]
    memory = ptx_emulator.Memory()
    address = memory.register(out.view(np.uint8))
    ptx_emulator.launch(
        kernel, grid=(4, 2, 1), threads=32, arguments=[address], memory=memory, target="sm_90", clusters=(2, 2, 1)
    )
    memory.write_back()
    got = out.reshape(2, 4, 32)
    for y in range(2):
        for x in range(4):
            fields = (x % 2 + 2 * y, 4, x // 2, x % 2, y, 2, 2)
            assert (got[y, x] == int("".join(map(str, fields)), 16)).all(), (x, y)


def test_each_cta_reads_what_its_peer_wrote() -> None:
    code = "add.u32 %r12, %tid0, %r5; st.shared.b32 [%r8], %r12; {sync} ld.shared::cluster.b32 %r1, [%r7]; {last}"
    out, report = go(code.format(sync=SYNC, last=SYNC), grid=4)
    np.testing.assert_array_equal(out, LANES + np.array([1, 0, 3, 2])[:, None])
    assert not report.faults
    assert kinds(go(code.format(sync="", last=SYNC))[1]) >= {"write-read"}
    assert kinds(go(code.format(sync=SYNC, last=""))[1]) == {"CTA ends while a peer may still reach into its memory"}
    relaxed = SYNC.replace("release", "relaxed")
    assert kinds(go(code.format(sync=relaxed, last=SYNC))[1]) == {"write-read"}
    assert go(code.format(sync="", last=SYNC), checks=False)[1].faults == []


def test_vectors_and_generic_addresses_of_a_peer() -> None:
    """Stores of two words through a generic address, with its rank asked for."""
    code = f"""mad.lo.u32 %r8, %tid0, 8, %r9; cvt.u64.u32 %d1, %r8; cvta.shared.u64 %d1, %d1; mapa.u64 %d2, %d1, %r3;
    getctarank.u64 %r12, %d2; getctarank.shared::cluster.u32 %r13, %r8; st.v2.b32 [%d2], {{%r12, %r13}}; {SYNC}
    ld.shared.v2.b32 {{%r14, %r15}}, [%r8]; mad.lo.u32 %r1, %r14, 16, %r15; {SYNC}"""
    out, report = go(code)
    np.testing.assert_array_equal(out, np.array([[0 * 16 + 1] * 32, [1 * 16 + 0] * 32]))
    assert not report.faults


def test_atomics_on_a_peer() -> None:
    code = f"""st.shared.b32 [%r8], 100; {SYNC} atom.shared::cluster.add.u32 %r12, [%r7], %tid0;
    red.shared::cluster.add.u32 [%r7], 1000; {SYNC} ld.shared.b32 %r1, [%r8]; {SYNC}"""
    out, report = go(code)
    np.testing.assert_array_equal(out, np.tile(1100 + LANES, (2, 1)))
    assert not report.faults
    assert kinds(go(code.replace(SYNC, "", 1))[1]) >= {"write-write"}


def test_nothing_is_taken_for_the_own_memory() -> None:
    """An address of a peer in an instruction of the own memory, a rank that is none, a CTA without a cluster."""
    with pytest.raises(ptx_emulator.MemoryFault, match="address of the CTA of rank 1, made by mapa"):
        go("@%p3 ld.shared.b32 %r1, [%r7];" + SYNC)
    with pytest.raises(ptx_emulator.MemoryFault, match="rank 1 where the own CTA's is meant"):
        go(FIRST + "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r6];" + SYNC)
    with pytest.raises(ptx_emulator.EmulationError, match="rank 2 in a cluster of 2"):
        go("mapa.shared::cluster.u32 %r7, %r8, 2;")
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the CTA's"):
        go("ld.shared::cluster.b32 %r1, [%r7+8192];" + SYNC)
    with pytest.raises(ptx_emulator.MemoryFault, match="CTA 1, which has ended"):
        go("@!%p3 ret; nanosleep.u32 1; ld.shared::cluster.b32 %r1, [%r7];".replace("nanosleep.u32 1;", "bar.sync 0;"))


REMOTE = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];"
WAIT = "$W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p5, [%r10], 0; @!%p5 bra $W;"


def test_arrivals_at_a_peers_barrier() -> None:
    """Data written there are seen behind the wait; an acquire or release of the CTA only does not reach so far."""
    code = FIRST + "add.u32 %r12, %tid0, %r5; st.shared::cluster.b32 [%r7], %r12;" + REMOTE + WAIT
    code += "ld.shared.b32 %r1, [%r8];" + SYNC
    out, report = go(code)
    np.testing.assert_array_equal(out, LANES + np.array([[1], [0]]))
    assert not report.faults
    assert kinds(go(code.replace("acquire.cluster.", ""))[1]) == {"write-read"}
    assert kinds(go(code.replace("arrive.release.cluster", "arrive.release.cta"))[1]) == {"write-read"}
    early = kinds(go(code.replace("[%r8];" + SYNC, "[%r8];"))[1])
    assert early == set(), "who has waited knows of every arrival"


def test_an_init_that_no_peer_was_told_of() -> None:
    code = "@%p2 mbarrier.init.shared::cta.b64 [%r10], 32; bar.sync 0;" + REMOTE + WAIT + SYNC
    assert kinds(go(code)[1]) == {"mbarrier used before its init is visible"}


def test_a_cta_that_ends_while_its_peer_may_still_arrive() -> None:
    code = FIRST + REMOTE + "@!%p3 bra $E;" + WAIT + "$E: "
    assert kinds(go(code)[1]) == {"CTA ends while a peer may still reach into its memory"}
    assert kinds(go(code + SYNC)[1]) == set()


def test_the_barrier_of_a_cluster() -> None:
    """Deadlock, threads that left, and threads that arrive twice or wait without having arrived."""
    with pytest.raises(
        ptx_emulator.Deadlock, match=r"barrier\.cluster\.wait.* 32 threads of the cluster of CTA 0 wait for 32"
    ):
        go("@!%p3 bra $E;" + SYNC + "$E: @%p3 ret; bar.sync 1, 64;")
    out, _ = go("@!%p3 ret;" + SYNC + "mov.b32 %r1, 6;")
    np.testing.assert_array_equal(out, [[6] * 32, [0] * 32])
    with pytest.raises(ptx_emulator.EmulationError, match="arrive again before they wait"):
        go("barrier.cluster.arrive; barrier.cluster.arrive;")
    with pytest.raises(ptx_emulator.EmulationError, match="wait that have not arrived"):
        go("barrier.cluster.wait;")
    code = "setp.lt.u32 %p4, %tid0, 3; @%p4 bra $A; barrier.cluster.arrive{0}; bra $J; $A: barrier.cluster.arrive{0};"
    code += "$J: barrier.cluster.wait;"
    with pytest.raises(ptx_emulator.Divergence, match="some lanes of a warp only"):
        go(code.replace("{0}", ".aligned"))
    assert not go(code.replace("{0}", ""))[1].faults


TOLD = "mbarrier::complete_tx::bytes"
EXPECT = "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {0};"


@pytest.mark.parametrize("landing", ["early", "late"])
def test_asynchronous_stores_and_reductions(landing: str) -> None:
    first = FIRST.replace("32;", "1;", 1) + "st.shared.b32 [%r8], 1000;" + EXPECT.replace("{0}", "128") + SYNC
    store = f"st.async.shared::cluster.{TOLD}.u32 [%r7], %tid0, [%r6];"
    read = WAIT + "ld.shared.b32 %r1, [%r8];" + SYNC
    out, report = go(first + store + read, landing=landing)
    np.testing.assert_array_equal(out, np.tile(LANES, (2, 1)))
    assert not report.faults
    add = f"red.async.relaxed.cluster.shared::cluster.{TOLD}.add.u32 [%r7], %tid0, [%r6];"
    out, report = go(first + add + read, landing=landing)
    np.testing.assert_array_equal(out, np.tile(1000 + LANES, (2, 1)))
    assert not report.faults
    assert kinds(go(first + store + read.replace(WAIT, SYNC), landing=landing)[1]) >= {
        "write-read" if landing == "early" else "read of a copy in flight"
    }


def test_launches_that_do_not_fit_the_cluster() -> None:
    for options, says in (
        ({"grid": 3}, "no whole number of clusters"),
        ({"clusters": 32, "grid": 32}, "1 to 16 CTAs"),
        ({"ctas": [0]}, "a part of a cluster"),
    ):
        with pytest.raises(ValueError, match=says):
            go(SYNC, **options)  # type: ignore[arg-type]
    text = entry(SYNC, 0, directives=".reqnctapercluster 2\n")
    with pytest.raises(ValueError, match=r"clusters of \(4, 1, 1\), but f requires \(2, 1, 1\)"):
        run(text, [], grid=4, clusters=4)
    out, report = go(SYNC + "mov.b32 %r1, 2;", grid=4, ctas=[2, 3])
    assert (report.ctas, out.any(1).tolist()) == (2, [False, False, True, True])
