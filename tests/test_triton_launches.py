"""How backend `triton` meets PyTorch: what it keeps, what it launches where, and what it never does.

No kernel runs here. Where launches matter, a driver without a GPU compiles and records them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from bcast_cases import Case, small
from fake_gpu import fake_gpu, gpu_autocast, kept_mib, module_and_streams
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.errors import TritonError

import cast_kernels
from cast_kernels.triton import bcast as triton_bcast
from cast_kernels.triton import common, tiles, weight_gradient

BF16, FP32 = torch.bfloat16, torch.float32
CASE = small(batch=1, frames=2, patches=3, dim=32, bottleneck=16, heads=1)
SMALL = {"dim": 64, "bottleneck_dim": 32, "num_heads": 2, "num_frames": 3, "num_patches": 5}


# --- memory ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_for_backward() -> None:
    """MiB a clip at the paper's size, as docs/ops/bcast.md has them; eager with flash attention, CUDA's autocast."""
    streams = 2 * (197 + 196) * 8 * 768 * 2 / 2 / 2**20  # bfloat16
    eager, amp = kept_mib("eager", "cheap", BF16), kept_mib("eager", "cheap", FP32, BF16)
    assert (round(eager, 1), round(amp, 1)) == (22.0, 34.6)
    for dtype, autocast in ((BF16, None), (FP32, BF16)):
        kept = [kept_mib("triton", recompute, dtype, autocast) for recompute in cast_kernels.Recompute]
        assert [round(x, 1) for x in kept] == [13.9, 4.7, 0.0]
        assert kept[1] <= amp / 2
        assert kept[2] <= 0.03 * streams


# --- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("autocast", [None, BF16], ids=str)
def test_the_module_is_one_graph_on_a_gpu(backend: str, autocast: torch.dtype | None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with fake_gpu(), gpu_autocast(autocast):
        module, *streams = module_and_streams(batch=2, backend=backend, **SMALL)
        outputs = torch.compile(module, fullgraph=True, backend=keep)(*streams)
        assert [x.shape for x in outputs] == [x.shape for x in streams]
        assert {x.device.type for x in outputs} == {"cuda"}
    (graph,) = graphs
    (call,) = [node for node in graph.graph.nodes if "cast_kernels.bcast" in str(node.target)]
    arguments = {a.name: value for a, value in zip(call.target._schema.arguments, call.args, strict=True)}
    assert arguments["backend"] == "triton"
    assert arguments["compute"] == (autocast or FP32)


def test_float64_streams_are_left_to_others_under_autocast_too() -> None:
    with fake_gpu(), gpu_autocast(BF16):
        module, *streams = module_and_streams(torch.float64, backend="triton", **SMALL)
        with pytest.raises(cast_kernels.BackendError, match=r"the streams are torch\.float64"):
            module(*streams)


# --- launches --------------------------------------------------------------------------------------------------------


class Journal:
    """Names of launched kernels, and whether each was launched inside of `watch`."""

    enforces_limits = True

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.inside: list[bool] = []
        self.ttir: dict[str, str] = {}
        self.device: torch.device | None = None

    def launch(self, launch: Launch) -> None:
        self.kernels.append(launch.kernel)
        self.ttir[launch.kernel] = launch.asm["ttir"]
        self.inside.append(self.device is not None)

    @contextmanager
    def watch(self, x: Tensor) -> Iterator[None]:
        self.device = x.device
        yield
        self.device = None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def train(case: Case = CASE, dtype: torch.dtype = BF16, recompute: str = "cheap") -> None:
    """Forward and backward."""
    module, inputs = case.module(dtype, "triton"), case.inputs(dtype, grad=True)
    module.recompute = recompute
    outputs = module(*inputs)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


FORWARD = ["project", "exchange"]
BACKWARD = ["project", "exchange_backward", "attention_backward", "attention_backward", "project_backward"]
BACKWARD += ["position_sums", "position_products", "reduce_rows", "weight_gradient", "sum_parts"]


def test_launches_of_a_step(cache: Path) -> None:
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        train()
    assert journal.kernels == FORWARD + BACKWARD


@pytest.mark.parametrize(
    ("trained", "launched"),
    [
        ("inputs", BACKWARD[:5]),
        ("cross_s_up.weight", [*BACKWARD[:2], "weight_gradient", "sum_parts"]),
        ("cross_t_up.bias", [*BACKWARD[:2], "reduce_rows"]),
        ("t2s_cross.vmae_time_pos", [*BACKWARD[:3], "position_sums", "position_products"]),
        ("ln_s_cross.bias", [*BACKWARD[:5], "reduce_rows"]),
    ],
)
def test_nothing_is_launched_for_what_is_frozen(trained: str, launched: list[str], cache: Path) -> None:
    """Each launch that is left leads to a wanted gradient; tests/interpreted compares them with a full backward's."""
    module, inputs = CASE.module(BF16, "triton"), CASE.inputs(BF16, grad=trained == "inputs")
    module.recompute = "cheap"
    assert trained == "inputs" or trained in dict(module.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        outputs = module(*inputs)
        journal.kernels.clear()
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert journal.kernels == launched


@pytest.mark.parametrize("changed", ["spatial", "cross_s_down.weight", "ln_t_cross.bias"])
def test_tensors_at_any_address_take_the_same_kernels(changed: str, cache: Path) -> None:
    """A slice of a larger storage, as of a flat parameter: copied to an address that the kernels were compiled for."""
    module, (spatial, temporal) = CASE.module(BF16, "triton"), CASE.inputs(BF16)

    def moved(x: Tensor) -> Tensor:
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:]
        assert flat.data_ptr() % 16
        return flat.view_as(x).copy_(x)

    kernels: list[str] = []
    addresses: list[int] = []

    def launch(launch: Launch) -> None:
        kernels.append(launch.identity)
        addresses.extend(a.value.data_ptr() for a in launch.arguments if isinstance(a.value, Tensor))

    keeper = SimpleNamespace(enforces_limits=True, launch=launch)
    with offline_driver(target("sm_80"), keeper, cache), torch.no_grad():
        module(spatial, temporal)
        if changed == "spatial":
            spatial = moved(spatial)
        else:
            parameter = dict(module.named_parameters())[changed]
            parameter.data = moved(parameter.data)
        module(spatial, temporal)
    assert kernels == 2 * kernels[:2]
    assert all(address % 16 == 0 for address in addresses)


@pytest.mark.parametrize(
    ("count", "programs", "parts"),
    [
        (84, 1, 1),  # not to be split
        (132, 132, 1),
        (48, 132, 2),  # 96 programs of a half: half the time; three parts take two rounds
        (144, 108, 3),  # 432 programs, four whole rounds of a third
        (10, 132, 4),  # no more parts than the workspace has
    ],
)
def test_rows_are_split_where_that_fills_the_chip(count: int, programs: int, parts: int) -> None:
    assert weight_gradient.split(count, programs) == parts


def test_kernels_that_walk_over_all_rows_multiply_them_in_64_bits(cache: Path) -> None:
    """The other kernels run past 2^31 elements in tests/interpreted/test_interpreted_offsets.py."""
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        train()
    offsets = {
        "weight_gradient": 2,
        "reduce_rows": 1,
        "position_sums": 2,
        "position_products": 1,
        "sum_parts": 1,
    }  # both operands; the partial sums; rows, sums; the sums; the parts
    for kernel, count in offsets.items():
        products = re.findall(r"arith\.muli .* : (?:tensor<\d+x1x)?(i\d+)>?", journal.ttir[kernel])
        assert products.count("i64") >= count, kernel
    for kernel in {*FORWARD, *BACKWARD}:
        assert "tt.addptr" in journal.ttir[kernel]
        assert re.search(r"tt\.addptr .*(?:xi64>|, i64)", journal.ttir[kernel]), kernel  # of a tile, or of a scalar


@pytest.mark.parametrize(("heads", "warps"), [(2, 4), (1, 8)])
def test_heads_of_64_channels_have_a_tile_of_their_own_in_long_windows(heads: int, warps: int, cache: Path) -> None:
    case = replace(CASE, patches=70, dim=32, bottleneck=64, heads=heads, directions=("t2s",), positions=False)
    with offline_driver(target("sm_80"), Recorder(), cache) as recorder:
        train(replace(case, windows=("space", "space")))
    (own,) = [r.first for r in recorder.records.values() if r.first.kernel == "attention_backward"]
    assert (own.constexprs["HEAD"], own.constexprs["BM"], own.metadata.num_warps) == (64 // heads, 128, warps)


def test_streams_and_parameters_of_different_dtypes_compile(cache: Path) -> None:
    """As autocast lets them differ: one kernel serves both streams, so its two branches must see the same types."""
    module = CASE.module(backend="triton")
    module.recompute = "cheap"
    module.cross_s_down.to(BF16)
    module.ln_t_cross.to(BF16)
    module.t2s_cross.to(BF16)
    spatial, temporal = CASE.inputs()
    inputs = (spatial.requires_grad_(), temporal.to(BF16).requires_grad_())
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        with torch.autocast("cpu", BF16):
            outputs = module(*inputs)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert [x.dtype for x in outputs] == [FP32, BF16]
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in (*inputs, *module.parameters()))
    assert journal.kernels == ["cast", *FORWARD, "cast", *BACKWARD]


def test_every_launch_is_on_the_streams_device(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        monkeypatch.setattr(triton_bcast, "on_device", journal.watch)
        train()
    assert journal.inside == [True] * len(FORWARD + BACKWARD)


def test_the_device_guard_is_of_the_tensor() -> None:
    guard = common.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3)))  # type: ignore[arg-type]
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 3
    assert not isinstance(common.on_device(torch.empty(1)), torch.cuda.device)


def test_device_and_stream_are_asked_for_at_every_call(cache: Path) -> None:
    """So its launches go to the stream that is current then: one that captures, or a side stream."""
    asked: list[tuple[str, Any]] = []
    used: list[Any] = []
    with offline_driver(target("sm_80"), Journal(), cache) as journal:
        driver = triton.runtime.driver.active
        make, current = driver.launcher_cls, driver.get_current_device

        def launcher_cls(source: Any, metadata: Any) -> Any:
            run = make(source, metadata)

            def launch(x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
                used.append(stream)
                run(x, y, z, stream, *rest)

            return launch

        def get_current_stream(device: Any) -> int:
            asked.append(("stream", device))
            return len(asked)

        def get_current_device() -> int:
            asked.append(("device", None))
            return current()

        driver.launcher_cls, driver.get_current_stream = launcher_cls, get_current_stream
        driver.get_current_device = get_current_device
        train()  # through Triton, which asks at every launch
        for seen in (journal.kernels, asked, used):
            seen.clear()
        train()
    assert [device for what, device in asked if what == "stream"] == [driver.device] * 2
    assert sum(what == "device" for what, _ in asked) >= 2
    assert journal.kernels == FORWARD + BACKWARD
    assert len(set(used[: len(FORWARD)])) == len(set(used[len(FORWARD) :])) == 1
    assert used[0] != used[-1]


def test_each_gpu_has_kernels_of_its_own(cache: Path) -> None:
    """A binary is loaded into one GPU's context; the second GPU of a process must get its own."""
    loaded: dict[int, set[str]] = {}
    with offline_driver(target("sm_80"), Journal(), cache):
        driver = triton.runtime.driver.active
        load, first = driver.utils.load_binary, driver.device

        def load_binary(name: str, binary: bytes, shared: int, device: int, *rest: Any) -> Any:
            loaded.setdefault(device, set()).add(name)
            return load(name, binary, shared, device, *rest)

        driver.utils.load_binary = load_binary
        try:
            for driver.device in (first, first + 1):
                train(replace(CASE, directions=("t2s",), positions=False))
        finally:
            for function in driver.functions:
                function.device_caches.pop(first + 1, None)
            driver.device = first
    assert set(loaded) == {first, first + 1}
    assert loaded[first] == loaded[first + 1] == {*FORWARD, *BACKWARD} - {"position_sums", "position_products"}


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the GPU or copies between it and the host: capture into a CUDA graph would fail."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket._qualified_op_name, kwargs or {}
        waits = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "lift_fresh", "lift_fresh_copy")
        if name.removeprefix("aten::") in waits or kwargs.get("pin_memory"):
            raise AssertionError(f"{name} waits for the GPU")
        devices = {x.device for x in args if isinstance(x, Tensor)}
        if devices and kwargs.get("device") not in (None, *devices):
            raise AssertionError(f"{name} moves to {kwargs['device']}, which waits for the GPU")
        return func(*args, **kwargs)


@pytest.mark.parametrize("recompute", ["nothing", "cheap", "all"])
@pytest.mark.parametrize("autocast", [None, BF16], ids=str)
def test_nothing_waits_for_the_gpu(recompute: str, autocast: torch.dtype | None, cache: Path) -> None:
    """Forward and backward as the operators call them. Memory is PyTorch's: Triton is asked for none."""
    case = replace(CASE, scaled=True)
    dtype = FP32 if autocast else BF16
    module, (spatial, temporal) = case.module(dtype), case.inputs(dtype)
    problem = replace(module.problem(case.batch), autocast=autocast)
    parameters = cast_kernels.Parameters.from_flat([p if p is None else p.detach() for p in module.gathered().flat()])
    tokens, clips = case.scales(dtype)
    assert tokens is not None
    assert clips is not None
    shared = (problem, spatial, temporal, parameters)
    with offline_driver(target("sm_80"), Journal(), cache) as journal, NoWaiting():
        y_s, y_t, saved = triton_bcast.forward(*shared, tokens, clips[:, None], 1e-6, recompute)
        wanted = (True,) * (2 + len(parameters.flat()))
        triton_bcast.backward(*shared, saved, tokens, clips[:, None], 1e-6, recompute, y_s, y_t, wanted)
    first = ["cast", *FORWARD] if autocast else FORWARD
    assert journal.kernels[: len(first)] == first
    assert journal.kernels[-2:] == ["weight_gradient", "sum_parts"]


def test_what_would_wait_is_refused() -> None:
    one = torch.ones(1)
    for wait in (lambda: one.item(), lambda: torch.tensor([1.0]), lambda: bool(one), lambda: one.to("meta")):
        with pytest.raises(AssertionError, match="waits for the GPU"), NoWaiting():
            wait()


def test_rows_that_are_no_multiple_of_the_queries_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no query of such a tile would be asked, and its output would be wrong in silence."""
    tile = tiles.Tile(rows=16, k=16, columns=32, warps=4, stages=1, queries=32, keys=32)
    monkeypatch.setattr(tiles, "find", lambda *_: tile)
    with offline_driver(target("sm_80"), Recorder()), torch.no_grad(), pytest.raises(TritonError, match="multiple"):
        cast_kernels.BCAST(32, 32, 2, 2, 3, backend="triton")(torch.ones(1, 2, 4, 32), torch.ones(1, 2, 3, 32))


@pytest.mark.parametrize(("capability", "ok"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_an_old_gpu_is_refused_in_words(capability: tuple[int, int], ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    problem = cast_kernels.Problem(1, 8, 196, 768, 384, 12, "time", "space", torch.bfloat16, "cuda")
    verdict = cast_kernels.backends.can_run("triton", problem)
    assert verdict.ok == ok
    assert ok or verdict.reason == "the GPU is sm_75; the kernels need sm_80 or newer"
