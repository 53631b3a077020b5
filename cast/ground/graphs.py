"""CUDA graphs: the launches of a function, recorded once for each shape of its arguments and then replayed.

A replay costs the host a few microseconds, whatever the number of kernels. The replayed kernels use the memory of the
recording. So arguments are copied into buffers, and results are copied out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: From tensors by name to tensors by name.
Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

#: Most recorded shapes. Each has its own buffers; further shapes run without a graph.
MOST = 8


def check_device(device: torch.device) -> None:
    """Raise ValueError unless graphs can be recorded there."""
    if device.type != "cuda":
        raise ValueError(
            f"graphs=true replays CUDA graphs, and this computes on {device.type}: set graphs=false, or run on a GPU"
        )


@dataclass(frozen=True)
class _Recording:
    """Launches, and the buffers that they read and write."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Graphs:
    """A function that records its launches and replays them.

    The first call with a shape runs without a graph. This also warms libraries up and compiles kernels. The second call
    records, later calls replay. So a smaller last batch that occurs once costs no recording, and one that occurs in
    every epoch gets one.

    Args:
        function: waits for nothing on the GPU, copies nothing to it, and draws from PyTorch's default generators only.
            Its Python code runs only while it is recorded.
        device: a GPU.
        kept: returns the tensors to which the function adds, such as gradients; a recording restores their values.
            Called for each recording.
        read: returns the tensors that the function reads besides its arguments, such as weights. If one of them has
            moved, the recordings are dropped. Called in each call.

    Raises:
        ValueError: another device.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        kept: Callable[[], Iterable[Tensor]] = lambda: (),
        read: Callable[[], Iterable[Tensor]] = lambda: (),
    ) -> None:
        check_device(device)
        self._function, self._device, self._kept, self._read = function, device, kept, read
        self._met: set[Any] = set()
        self._recordings: dict[Any, _Recording] = {}
        self._at: tuple[int, ...] = ()
        # Replays follow each other on one stream and share no values, so one memory pool serves them all.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, inputs: Mapping[str, Tensor], seed: int | None = None) -> dict[str, Tensor]:
        """The function's results for the inputs; the caller may keep them.

        Args:
            inputs: on the device.
            seed: seed of PyTorch's generators at the start of the function; None leaves their state.

        Raises:
            RuntimeError: a graph cannot record the function; the message is PyTorch's.
        """
        at = tuple(x.data_ptr() for x in self._read())
        if at != self._at:
            self._met, self._recordings, self._at = set(), {}, at
        key = tuple((name, x.shape, x.stride(), x.dtype) for name, x in sorted(inputs.items()))
        recording = self._recordings.get(key)
        if recording is None and key in self._met and len(self._recordings) < MOST:
            recording = self._recordings[key] = self._record(inputs)
        self._met.add(key)
        if seed is not None:
            torch.manual_seed(seed)
        if recording is None:
            return self._function(inputs)
        for name, buffer in recording.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        recording.graph.replay()
        return {name: buffer.clone() for name, buffer in recording.outputs.items()}

    def _record(self, inputs: Mapping[str, Tensor]) -> _Recording:
        buffers = {name: x.clone(memory_format=torch.preserve_format) for name, x in inputs.items()}
        kept = list(self._kept())
        copies = [x.clone() for x in kept]
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function(buffers)  # libraries have a workspace for each stream
        current.wait_stream(self._stream)
        try:
            # Only this thread must avoid calls that a recording forbids: the loader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._function(buffers)
        except RuntimeError as error:
            raise RuntimeError(f"this cannot be recorded as a CUDA graph, so set graphs=false: {error}") from error
        if list(map(id, kept)) != list(map(id, self._kept())):
            raise RuntimeError("the function replaced tensors to which a graph would add, so set graphs=false")
        for x, copy in zip(kept, copies, strict=True):
            x.copy_(copy)
        return _Recording(graph, buffers, outputs)
