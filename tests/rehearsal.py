"""A pytest plugin that rehearses `pytest benchmarks/ --device cuda` on a machine without a GPU.

    PYTHONPATH=tests:tools pytest -p rehearsal benchmarks/ --benchmark-only --device cuda --sizes small

Our Triton kernels compile for sm_80, those of csrc/cuda are what the build made for sm_90; each distinct one is
emulated once, and later launches of it are recorded only. Every other row runs its own Python, with its own arguments,
up to a stand-in for what needs the GPU: events, graphs and memory figures of `torch.cuda`, PyTorch's attention kernels
by name, `torch.compile`'s code generator, and the packages xformers and flash-attn. A stand-in takes what the real
thing's signature takes, and refuses what the real thing refuses. Tensors are on the CPU. Each row of the report says
that it was stood in for.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cast_kernels import _native, attention
from cast_kernels.evidence.cuda_launches import CudaLaunch, execute, taken
from cast_kernels.gpu import machine as machines

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class EmulatedOnce:
    """Launcher that emulates the first launch of each compiled kernel, of both backends, and records the others."""

    enforces_limits = True

    def __init__(self) -> None:
        self.emulator = Emulator()
        self.launches: dict[str, int] = {}
        self.kernels: set[str] = set()
        self.recorded = 0

    def launch(self, launch: Launch) -> None:
        if self._is_first(launch.kernel, launch.identity):
            self.emulator.launch(launch)  # on any bits, where a launch before was recorded only

    def launch_cuda(self, launch: CudaLaunch) -> None:
        """The same of csrc/cuda, where each compiled kernel has a name of its own."""
        if self._is_first(launch.kernel, launch.kernel):
            execute(launch).refuse_faults()

    def _is_first(self, kernel: str, identity: str) -> bool:
        self.kernels.add(kernel)
        before = self.launches.get(identity, 0)
        self.launches[identity] = before + 1
        self.recorded += before > 0
        return not before


class Rehearsal(machines.CudaMachine):
    """The product's machine, its Python as it is, on the stand-ins of :func:`torch_cuda`."""

    stand_in = "an emulated device"
    flush_bytes = 1 << 10
    launcher: EmulatedOnce

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def computed(self) -> bool:
        recorded, self.launcher.recorded = self.launcher.recorded, 0
        return not recorded


class Event:
    """A CUDA event: two that were recorded and reached are ten milliseconds apart, so a sample is one call."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timing, self.recorded = enable_timing, False

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "an event that was not recorded is waited for"

    def elapsed_time(self, end_event: Event) -> float:
        assert self.timing, "events without timing have no time"
        assert end_event.timing, "events without timing have no time"
        assert self.recorded, "an event was not recorded"
        assert end_event.recorded, "an event was not recorded"
        return 10.0


class Capturing(TorchDispatchMode):
    """Refuses what a stream that is capturing refuses: to wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
        if any(name in str(func) for name in waiting):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class Graph:
    """A CUDA graph, which can be replayed once it was captured."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.captured = False

    def replay(self) -> None:
        assert self.captured, "a graph that was not captured is replayed"


@contextmanager
def capture(
    cuda_graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    assert pool in (None, (0, 1)), "a pool is what graph_pool_handle returned"
    with Capturing():
        yield
    cuda_graph.captured = True


class Stream:
    """A CUDA stream that nobody waits for in vain."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    assert isinstance(stream, Stream)
    yield


H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85 << 30)

#: Function of `torch.cuda` -> what stands in for it. `as_real` checks the arguments.
TORCH_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "current_stream": lambda device=None: Stream(),
    "synchronize": lambda device=None: None,
    "get_device_properties": lambda device=None: H100,
    "memory_allocated": lambda device=None: 1 << 20,
    "max_memory_allocated": lambda device=None: 3 << 20,
    "reset_peak_memory_stats": lambda device=None: None,
    "graph_pool_handle": lambda: (0, 1),
    "stream": on_stream,
}
CLASSES = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": capture}


def as_real(real: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """The stand-in, which refuses arguments that the real function does not take."""
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return stand_in(*args, **kwargs)

    return call


class Checked(TorchFunctionMode):
    """PyTorch's attention by kernels that a GPU would refuse for some operands."""

    def __init__(self, kernels: list[SDPBackend]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q = args[0]
            compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
            only_16 = {SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION}
            if compute not in SIXTEEN_BITS and set(self.kernels) <= only_16:
                raise RuntimeError("No available kernel. Aborting execution.")
        return func(*args, **(kwargs or {}))


@contextmanager
def sdpa_kernel(backends: list[SDPBackend] | SDPBackend, set_priority: bool = False) -> Iterator[None]:
    kernels = [backends] if isinstance(backends, SDPBackend) else list(backends)
    assert all(isinstance(kernel, SDPBackend) for kernel in kernels)
    with Checked(kernels):
        yield


def check_heads(library: str, *heads: Tensor, dtypes: tuple[torch.dtype, ...] = SIXTEEN_BITS) -> None:
    """What both packages ask of [batch, tokens, heads, head_dim]."""
    for x in heads:
        assert x.ndim == 4, f"{library} takes four dimensions, not {tuple(x.shape)}"
        assert x.dtype in dtypes, f"{library} takes {dtypes}, not {x.dtype}"
        assert x.dtype == heads[0].dtype, f"{library} takes one dtype"
        assert x.stride(-1) == 1, f"{library} takes contiguous channels"
        assert x.shape[-1] % 8 == 0, f"{library} takes heads of a multiple of 8 channels"
        assert x.shape[-1] <= 256, f"{library} takes heads of at most 256 channels"


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over tokens, [batch, tokens, heads, head_dim]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    check_heads("flash-attn", q, k, v)
    return mix(q, k, v)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert qkv.ndim == 5
    assert qkv.shape[2] == 3
    return flash_attn_func(*qkv.unbind(2))


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    check_heads("xformers", query, key, value, dtypes=(*SIXTEEN_BITS, torch.float32))
    return mix(query, key, value)


def packages() -> dict[str, ModuleType]:
    """xformers and flash-attn as modules."""
    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    flash.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    flash.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    xformers.ops = ops  # type: ignore[attr-defined]
    return {"flash_attn": flash, "xformers": xformers, "xformers.ops": ops}


def compile_without_code(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with its tracers, whose graphs run in eager PyTorch instead of generated code."""

    def call(model: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
        return real(model, dynamic=dynamic, backend="aot_eager")

    return call


@contextmanager
def rehearsing(cache: Path | None = None) -> Iterator[EmulatedOnce]:
    """Everything above in the places of the real things, and the launcher that took our launches."""
    real_can_run = attention.can_run
    with ExitStack() as stack:
        launcher = stack.enter_context(offline_driver(target("sm_80"), EmulatedOnce(), cache))
        if _native.CUDA is not None:
            stack.enter_context(taken(launcher.launch_cuda))
        for name, stand_in in TORCH_CUDA.items():
            if name != "is_available":
                stack.enter_context(mock.patch.object(torch.cuda, name, as_real(getattr(torch.cuda, name), stand_in)))
        for name, made in CLASSES.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, made))

        def initialise(self: Rehearsal) -> None:
            with mock.patch.object(torch.cuda, "is_available", TORCH_CUDA["is_available"]):
                machines_init(self)

        machines_init = machines.CudaMachine.__init__
        Rehearsal.launcher = launcher
        stack.enter_context(mock.patch.object(Rehearsal, "__init__", initialise))
        stack.enter_context(mock.patch.object(machines, "CudaMachine", Rehearsal))
        stack.enter_context(mock.patch.object(torch.nn.attention, "sdpa_kernel", sdpa_kernel))
        stack.enter_context(mock.patch.object(torch, "compile", compile_without_code(torch.compile)))
        stack.enter_context(mock.patch.dict(sys.modules, packages()))
        on_gpu = lambda name, problem: real_can_run(name, replace(problem, device="cuda"))  # noqa: E731
        stack.enter_context(mock.patch.object(attention, "can_run", on_gpu))
        yield launcher


_STACK = pytest.StashKey[ExitStack]()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before benchmarks/conftest.py imports what is replaced."""
    stack = early_config.stash[_STACK] = ExitStack()
    cache = os.environ.get("REHEARSAL_CACHE")
    stack.enter_context(rehearsing(Path(cache) if cache else None))


def pytest_unconfigure(config: pytest.Config) -> None:
    launcher = Rehearsal.launcher
    count, kernels = len(launcher.launches), ", ".join(sorted(launcher.kernels))
    print(f"\nrehearsal: {sum(launcher.launches.values())} launches, of them {count} emulated: {kernels}")
    config.stash[_STACK].close()
