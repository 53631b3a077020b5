"""Tensor descriptors made by the host: a copy by TMA on sm_90, and by numbers of their own on sm_80."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.targets import target
from ptx_emulator.triton import descriptors
from ptx_emulator.triton.descriptors import HostMap, expand, obstacle
from ptx_emulator.triton.driver import Argument, Launch, Recorder, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator, spans
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from cast_kernels.versions import release

pytestmark = pytest.mark.skipif(
    release(triton.__version__) < (3, 8), reason="before Triton 3.8 descriptors are refused, with the reason"
)
ROWS, WIDTH = 48, 64


@triton.jit
def double(x, y, ROWS: tl.constexpr):
    """y = 2 * x, blocks of ROWS rows through shared memory."""
    first = tl.program_id(0) * ROWS
    y.store([first, 0], x.load([first, 0]) * 2)


@triton.jit
def of_tuple(pair, factor, ROWS: tl.constexpr):
    pair[1].store([tl.program_id(0) * ROWS, 0], pair[0].load([tl.program_id(0) * ROWS, 0]) * factor)


@gluon.jit
def copy(x, y, ROWS: gl.constexpr):
    """y = x, by TMA both ways."""
    tile = gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    mbarrier.expect(arrived, x.nbytes_per_cta)
    tma.async_load(x, [gl.program_id(0) * ROWS, 0], arrived, tile)
    mbarrier.wait(arrived, 0)
    mbarrier.invalidate(arrived)
    tma.async_store(y, [gl.program_id(0) * ROWS, 0], tile)
    tma.store_wait(0)


def matrices(kind: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH).remainder(127).to(kind), torch.full(
        (ROWS, WIDTH), 7, dtype=kind
    )


def described(tensor: Tensor, rows: int = 16, **changes: object) -> TensorDescriptor:
    return replace(TensorDescriptor.from_tensor(tensor, [rows, WIDTH]), **changes)


def run(name: str, x: TensorDescriptor, y: TensorDescriptor, programs: int = 3, engine: str = "interpreter") -> None:
    with offline_driver(target(name), Emulator(engine=engine)):
        double[(programs,)](x, y, ROWS=16)


@pytest.mark.parametrize("engine", ["interpreter", "native"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_what_the_descriptors_describe_is_copied(name: str, kind: torch.dtype, engine: str) -> None:
    x, y = matrices(kind)
    width = 32 if kind == torch.float32 else 64  # a row of a box has 128 bytes at most
    with offline_driver(target(name), Emulator(engine=engine)):
        double[(3,)](
            TensorDescriptor.from_tensor(x, [16, width]), TensorDescriptor.from_tensor(y, [16, width]), ROWS=16
        )
    assert torch.equal(y[:, :width], 2 * x[:, :width])
    assert bool((y[:, width:] == 7).all())


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_descriptors_in_a_tuple(name: str) -> None:
    x, y = matrices(torch.float16)
    with offline_driver(target(name), Emulator()):
        of_tuple[(3,)]((described(x), described(y)), 3.0, ROWS=16)
    assert torch.equal(y, 3 * x)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_rows_outside_of_the_shape_are_not_touched(name: str) -> None:
    x, y = matrices()
    run(name, described(x, shape=[40, WIDTH]), described(y, shape=[40, WIDTH]))
    assert torch.equal(y[:40], 2 * x[:40])
    assert bool((y[40:] == 7).all())


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_rows_outside_of_the_shape_are_filled(name: str, padding: str) -> None:
    x, y = matrices()
    run(name, described(x, shape=[40, WIDTH], padding=padding), described(y))
    assert torch.equal(y[:40], 2 * x[:40])
    assert bool((y[40:].isnan() if padding == "nan" else y[40:] == 0).all())


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("wrong", ["x", "y"])
def test_a_shape_larger_than_the_tensor_is_reported(name: str, wrong: str) -> None:
    """The hardware would read or write what lies behind the tensor."""
    x, y = matrices()
    given = {"x": described(x), "y": described(y)}
    given[wrong] = replace(given[wrong], shape=[64, WIDTH])
    with pytest.raises(EmulationFault, match="MemoryFault"):
        run(name, given["x"], given["y"], programs=4)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_a_stride_too_large_is_reported(name: str) -> None:
    x, y = matrices()
    with pytest.raises(EmulationFault, match="MemoryFault"):
        run(name, described(x, strides=[2 * WIDTH, 1]), described(y))


def test_a_view_is_described_by_its_strides() -> None:
    x, y = matrices()
    run("sm_90", described(x[8:40], shape=[16, WIDTH], strides=[2 * WIDTH, 1]), described(y), programs=1)
    assert torch.equal(y[:16], 2 * x[8:40:2])


def test_what_cudas_driver_refuses_is_refused() -> None:
    x, y = matrices()
    odd = x.reshape(-1)[8:].as_strided((47, WIDTH), (WIDTH, 1))
    odd = odd.reshape(-1)[4:].as_strided((40, WIDTH), (WIDTH, 1))  # 8 bytes behind a multiple of 16
    given = described(x)
    given.base = odd
    with pytest.raises(ValueError, match=r"argument x\.map: .* multiple of 16; CUDA's driver refuses such a map"):
        run("sm_90", given, described(y))


def test_gluons_descriptors() -> None:
    x, y = matrices(torch.float16)
    layout = gl.NVMMASharedLayout.get_default_for([16, WIDTH], gl.float16)
    given = [GluonDescriptor.from_tensor(tensor, [16, WIDTH], layout) for tensor in (x, y)]
    with offline_driver(target("sm_90"), Emulator()):
        copy[(3,)](*given, ROWS=16)
    assert torch.equal(x, y)
    given[0].shape = [64, WIDTH]
    with offline_driver(target("sm_90"), Emulator()), pytest.raises(EmulationFault, match="MemoryFault"):
        copy[(4,)](*given, ROWS=16)


def recorded(name: str) -> Launch:
    x, y = matrices()
    with offline_driver(target(name), Recorder()) as recorder:
        double[(3,)](described(x), described(y), ROWS=16)
    (record,) = recorder.records.values()
    return record.first


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_a_launch_has_what_the_kernel_takes(name: str) -> None:
    launch = recorded(name)
    parameters = launch.asm["ptx"].split(".visible .entry")[1].split("{")[0].count(".param")
    assert len(launch.arguments) == parameters - 2  # Triton's pointers to scratch memory
    first = {"sm_80": ("x.base", "*bf16"), "sm_90": ("x.map", "nvTmaDesc")}[name]
    assert (launch.arguments[0].name, launch.arguments[0].type) == first
    assert [argument.name for argument in launch.arguments[-4:]] == [
        "y.shape.0",
        "y.shape.1",
        "y.strides.0",
        "y.strides.1",
    ]
    assert [argument.value for argument in launch.arguments[-4:]] == [ROWS, WIDTH, WIDTH, 1]


def test_the_memory_of_a_map_is_its_tensors() -> None:
    x, _ = matrices()
    (mapped, *_rest) = recorded("sm_90").arguments
    assert isinstance(mapped.value, HostMap)
    assert mapped.value[1:] == ("bf16", (WIDTH, ROWS), (2 * WIDTH,), (WIDTH, 16), 128, "zero")
    (span,) = spans([Argument("x.map", "nvTmaDesc", mapped.value._replace(base=x[8:]))])
    assert span.stop - span.start == 2 * (ROWS - 8) * WIDTH
    with pytest.raises(TypeError, match=r"argument x\.map \(nvTmaDesc\)"):
        spans([Argument("x.map", "nvTmaDesc", mapped.value._replace(base=None))])


def test_what_is_not_emulated_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"fp4_padded": False, "is_im2col": False}
    assert obstacle("tensordesc<bf16[16, 64]>", [plain]) == ""
    assert obstacle("tensordesc<bf16[16, 64]>", None) == ""
    assert "fp4" in obstacle("tensordesc<u8[16, 64]>", [plain, plain | {"fp4_padded": True}])
    assert "im2col" in obstacle("tensordesc_im2col<bf16[16, 64],input_rank=4>", [plain])
    monkeypatch.setattr(descriptors, "decompose_descriptor", None)
    x, y = matrices()
    with pytest.raises(NotImplementedError, match=r"double takes a tensor descriptor \(x\): .*3\.8 or newer"):
        run("sm_90", described(x), described(y))


def test_what_is_expanded_is_as_long_as_tritons_own_signature() -> None:
    from triton.backends.driver import expand_signature

    x, _ = matrices()
    kind = f"tensordesc<bf16[16, {WIDTH}]>"
    meta = {"elem_size": 2, "elem_type": 10, "block_size": [16, WIDTH], "swizzle": 3}
    for told in (None, meta):
        ours = [part for _, part, _ in expand(kind, described(x), told)]
        assert ours == expand_signature([kind], [told] if told else [], "nvTmaDesc")
