"""What a performance model needs to know about a launch, counted as the instructions execute."""

from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.core.spaces import Array

SECTOR = 32  # bytes


@dataclass
class Counters:
    """Totals over all CTAs of a launch. Requests are of warps; bytes are of active lanes.

    A wavefront is a pass through shared memory: for each phase of 32, 16 or 8 lanes (at most 4, 8, 16 bytes a lane) the
    largest number of distinct words in one of the 32 banks.
    """

    tensor_flops: int = 0  #: 2 M N K of each tensor-core instruction that was executed
    tensor_flops_by_kind: dict[str, int] = field(default_factory=dict)  #: the same by opcode and types
    global_load_sectors: int = 0  #: distinct 32-byte sectors that a warp touches, summed over requests
    global_load_bytes: int = 0  #: of active lanes
    global_load_requests: int = 0  #: of warps
    global_store_sectors: int = 0  #: distinct 32-byte sectors that a warp touches, summed over requests
    global_store_bytes: int = 0  #: of active lanes
    global_store_requests: int = 0  #: of warps
    shared_load_wavefronts: int = 0  #: as above
    shared_load_wavefronts_ideal: int = 0  #: phases with an active lane: what no bank conflict would take
    shared_load_bytes: int = 0  #: of active lanes
    shared_load_requests: int = 0  #: of warps
    shared_store_wavefronts: int = 0  #: as above
    shared_store_wavefronts_ideal: int = 0  #: phases with an active lane: what no bank conflict would take
    shared_store_bytes: int = 0  #: of active lanes
    shared_store_requests: int = 0  #: of warps
    async_copy_bytes: int = 0  #: copied to shared memory by `cp.async`
    atomic_operations: int = 0  #: of active lanes
    barriers: int = 0  #: of CTAs
    warp_instructions: int = 0  #: PTX instructions, once a warp with a live lane there, predicated off or not

    def tensor(self, kind: str, flops: int) -> None:
        """Count a tensor-core instruction."""
        self.tensor_flops += flops
        self.tensor_flops_by_kind[kind] = self.tensor_flops_by_kind.get(kind, 0) + flops

    def add_global(self, way: str, offsets: Array, mask: Array | None, size: int, shape: tuple[int, int]) -> None:
        """Count an access of `size` bytes a lane. offsets: (CTAs or 1, threads or 1); way: "load" or "store"."""
        sectors, requests, lanes = _sectors(offsets >> 5, mask, shape)
        name = f"global_{way}_"
        setattr(self, name + "sectors", getattr(self, name + "sectors") + sectors * max(1, size // SECTOR))
        setattr(self, name + "requests", getattr(self, name + "requests") + requests)
        setattr(self, name + "bytes", getattr(self, name + "bytes") + lanes * size)

    def add_shared(self, way: str, addresses: Array, mask: Array | None, size: int, times: int) -> None:
        """Count an access of `size` bytes a lane. addresses, mask: (n, threads), each row `times` CTAs with equal
        addresses."""
        wavefronts, ideal, requests, lanes = _wavefronts(addresses, mask, size)
        name = f"shared_{way}_"
        for field_name, amount in (
            ("wavefronts", wavefronts),
            ("wavefronts_ideal", ideal),
            ("requests", requests),
            ("bytes", lanes * size),
        ):
            setattr(self, name + field_name, getattr(self, name + field_name) + amount * times)


def _sectors(sectors: Array, mask: Array | None, shape: tuple[int, int]) -> tuple[int, int, int]:
    """(distinct sectors per warp summed over warps, warps with an active lane, active lanes)."""
    ctas, threads = shape
    times = 1
    if mask is None:
        if sectors.shape[1] == 1:
            warps = ctas * threads // 32
            return warps, warps, ctas * threads
        times = ctas // sectors.shape[0]
        rows = sectors.reshape(-1, 32)
        steps = rows[:, 1:] - rows[:, :-1]
        if steps.min(initial=0) >= 0:
            return (len(rows) + int(np.count_nonzero(steps))) * times, len(rows) * times, rows.size * times
        lanes, empty = rows.size, 0
        rows = np.sort(rows, axis=1)
    else:
        height = max(sectors.shape[0], mask.shape[0])
        times = ctas // height
        mask = np.broadcast_to(mask, (height, threads))
        rows = np.where(mask, np.broadcast_to(sectors, (height, threads)), -1).reshape(-1, 32)
        lanes = int(np.count_nonzero(mask))
        rows = np.sort(rows, axis=1)
        empty = int(np.count_nonzero(rows[:, 0] == -1))
    distinct = len(rows) + int(np.count_nonzero(rows[:, 1:] != rows[:, :-1])) - empty
    requests = len(rows) if mask is None else int(np.count_nonzero(rows[:, -1] != -1))
    return distinct * times, requests * times, lanes * times


def _wavefronts(addresses: Array, mask: Array | None, size: int) -> tuple[int, int, int, int]:
    """(wavefronts, phases with an active lane, warps with one, active lanes)."""
    unit = max(size, 4)
    lanes_a_phase = 128 // unit
    units = (addresses // unit).reshape(-1, lanes_a_phase)
    active = np.ones(units.shape, bool) if mask is None else np.ascontiguousarray(mask).reshape(-1, lanes_a_phase)
    lanes = int(np.count_nonzero(active))
    busy = active.any(1)
    ideal = int(np.count_nonzero(busy))
    requests = int(np.count_nonzero(active.reshape(-1, 32).any(1)))
    bank = np.where(active, np.uint32(1) << (units % lanes_a_phase).astype(np.uint32), np.uint32(0))
    used = np.bitwise_or.reduce(bank, axis=1)
    clean = np.bitwise_count(used) == active.sum(1)
    wavefronts = int(np.count_nonzero(clean & busy))
    rest = ~clean
    if rest.any():
        rows = np.sort(np.where(active[rest], units[rest], -1), axis=1)
        first = np.ones(rows.shape, bool)
        first[:, 1:] = rows[:, 1:] != rows[:, :-1]
        first &= rows >= 0
        key = np.arange(len(rows))[:, None] * lanes_a_phase + rows % lanes_a_phase
        load = np.bincount(key[first], minlength=len(rows) * lanes_a_phase).reshape(len(rows), lanes_a_phase)
        wavefronts += int(load.max(1).sum())
    return wavefronts, ideal, requests, lanes
