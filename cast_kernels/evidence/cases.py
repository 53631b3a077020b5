"""Problems with random parameters, their run in given dtypes, and the measure of their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import cast_kernels
from cast_kernels.evidence.autocast import cuda_rules

Scales = tuple[Tensor | None, Tensor | None]
#: (dtype of products or None, the device's type) -> the context with autocast.
Rules = Callable[[torch.dtype | None, str], AbstractContextManager[None]]
#: Names of dtypes on the command line.
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


#: Dtypes of the residual streams under autocast.
STREAMS: dict[str, torch.dtype] = {name: DTYPES[name] for name in ("fp32", "bf16")}


class Kind(NamedTuple):
    """The dtypes of a model. Its fields are arguments of :func:`run`."""

    dtype: torch.dtype  # of the parameters, and of the streams if `streams` is None
    autocast: torch.dtype | None = None
    streams: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        """Dtype of the products' operands."""
        return self.autocast or self.dtype


#: Everything in one dtype, or autocast. `amp` is the setting of `cast train`: parameters and residual streams in
#: float32, products in bfloat16. `amp16` has bfloat16 streams (the model's `stream_dtype="autocast"`).
KINDS: dict[str, Kind] = {name: Kind(dtype) for name, dtype in DTYPES.items()} | {
    "amp": Kind(torch.float32, torch.bfloat16),
    "amp16": Kind(torch.float32, torch.bfloat16, STREAMS["bf16"]),
}


@dataclass(frozen=True)
class Case:
    """Sizes and structure of one B-CAST call, and its numbers: the same everywhere, drawn in float32 on the CPU.

    The defaults are the paper's with two clips. Checks without a GPU, checks on a GPU and tests all use this class.
    """

    batch: int = 2
    frames: int = 8
    patches: int = 196
    dim: int = 768
    bottleneck: int = 384
    heads: int = 12
    windows: tuple[str, str] = ("time", "space")
    directions: tuple[str, ...] = ("t2s", "s2t")
    positions: bool = True
    scaled: bool = False  # whether both branches have drop-path factors
    recompute: str = "cheap"
    backward: bool = True
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"B{self.batch} T{self.frames} N{self.patches} D{self.dim} d{self.bottleneck} h{self.heads}"
        parts = [sizes, f"{'+'.join(self.directions)} {'/'.join(self.windows)}"]
        parts += ["" if self.positions else "no positions", "drop-path" if self.scaled else ""]
        parts += [f"forward, backward, recompute {self.recompute}" if self.backward else "forward"]
        return ", ".join(part for part in parts if part)

    def module(self, dtype: torch.dtype = torch.float32, backend: str = "auto") -> cast_kernels.BCAST:
        """A module with only random parameters: no zero up-projection, no LayerNorm weight of one."""
        made = cast_kernels.BCAST(
            self.dim, self.bottleneck, self.heads, self.frames, self.patches, self.windows, self.directions,
            self.positions, backend, self.recompute,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1000 + self.seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = parameter.shape[-1] if parameter.ndim == 2 and not name.endswith("_pos") else 4
                parameter.copy_(noise * fan_in**-0.5 + (1.0 if "ln_" in name and "weight" in name else 0.0))
        return made.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor]:
        """The spatial and the temporal stream, `[B, T, 1+N, D]` and `[B, T, N, D]`."""
        spatial, temporal = (x.to(dtype).requires_grad_(grad) for x in self._draw()[0])
        return spatial, temporal

    def scales(self, dtype: torch.dtype = torch.float32) -> Scales:
        """Drop-path factors, some of them zero: per token position on one stream, per clip on the other."""
        tokens, clips = self._draw()[1]
        return (tokens, clips) if tokens is None or clips is None else (tokens.to(dtype), clips.to(dtype))

    def output_grads(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The gradients of both outputs, with the inputs' shapes."""
        inputs, _, generator = self._draw()
        spatial, temporal = (torch.randn(x.shape, generator=generator).to(dtype) for x in inputs)
        return spatial, temporal

    def _draw(self) -> tuple[tuple[Tensor, Tensor], Scales, torch.Generator]:
        """Both streams, both scales, and the generator, which next draws the outputs' gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.frames, self.patches, self.dim)
        spatial = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3], generator=generator)
        temporal = torch.randn(shape, generator=generator)
        if not self.scaled:
            return (spatial, temporal), (None, None), generator
        tokens = torch.bernoulli(torch.full((self.batch, 1 + self.patches), 0.7), generator=generator) / 0.7
        clips = torch.bernoulli(torch.full((self.batch,), 0.7), generator=generator) / 0.7
        return (spatial, temporal), (tokens, clips), generator


def run(
    case: Case, backend: str | None, dtype: torch.dtype, exact: bool = False, device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None, streams: torch.dtype | None = None, rules: Rules = cuda_rules,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs, and every gradient if the case asks for them, in float64 on the CPU.

    Args:
        case: the problem.
        backend: runs the problem; None is the reference.
        dtype: inputs and parameters are rounded to it.
        exact: compute in float64 on the rounded numbers.
        device: of the computation.
        autocast: dtype of the products under autocast, or None for no autocast.
        streams: the streams are rounded to it, if given.
        rules: of autocast.
    """
    made = case.module(dtype, backend or "eager").to(device)
    dtype = streams or dtype
    spatial, temporal = (x.to(device) for x in case.inputs(dtype))
    scales = tuple(x if x is None else x.to(device) for x in case.scales(dtype))
    if exact:
        made, spatial, temporal = made.double(), spatial.double(), temporal.double()
        scales = tuple(x if x is None else x.double() for x in scales)
    spatial.requires_grad_(case.backward)
    temporal.requires_grad_(case.backward)
    ruled = rules(None if exact else autocast, torch.device(device).type)
    with nullcontext() if case.backward else torch.no_grad(), ruled:
        if backend is None:
            outputs = cast_kernels.reference.bcast(
                spatial, temporal, made.gathered(), num_heads=case.heads, windows=case.windows,
                spatial_scale=scales[0], temporal_scale=scales[1],
            )  # fmt: skip
        else:
            outputs = made(spatial, temporal, *scales)
    result = {"spatial": outputs[0], "temporal": outputs[1]}
    if case.backward:
        given = zip(case.output_grads(dtype), outputs, strict=True)
        torch.autograd.backward(outputs, [grad.to(x.device, x.dtype) for grad, x in given])
        leaves = {"spatial": spatial, "temporal": temporal} | dict(made.named_parameters())
        result |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: x.detach().double().cpu() for name, x in result.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, so that unwritten elements are found."""
    settings = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not torch.empty(1).isnan():
            raise RuntimeError("set torch.utils.deterministic.fill_uninitialized_memory = True: new memory must be NaN")
        yield
    finally:
        torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])


class Error(NamedTuple):
    """One tensor's error against fp64 and eager's in the same dtype, both absolute."""

    name: str
    rms: float
    eager_rms: float
    worst: float
    eager_worst: float
    floor: float  # half a unit in float32's last place of the tensor's largest value

    @property
    def ratio(self) -> float:
        """Our root mean square over eager's. NaN if ours is NaN; 0 if neither errs, as for a gradient that drop-path
        zeroed.
        """
        allowed = max(self.eager_rms, self.floor)
        if not self.rms:
            return 0.0
        return self.rms / allowed if allowed else math.inf

    @property
    def ok(self) -> bool:
        """At most twice eager's root mean square and four times its largest error; false for NaN."""
        return self.rms <= max(2 * self.eager_rms, self.floor) and self.worst <= 4 * max(self.eager_worst, self.floor)


def compare(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> list[Error]:
    """The errors of every tensor.

    Raises:
        ValueError: the three have different tensors.
    """
    if not ours.keys() == eager.keys() == exact.keys():
        names = sorted((ours.keys() | eager.keys() | exact.keys()) - (ours.keys() & eager.keys() & exact.keys()))
        raise ValueError(f"{', '.join(names)}: not in all of ours, eager and exact")
    errors = []
    for name, truth in exact.items():
        mine, theirs = ours[name] - truth, eager[name] - truth
        errors.append(
            Error(
                name,
                _rms(mine),
                _rms(theirs),
                float(mine.abs().max()),
                float(theirs.abs().max()),
                2**-24 * float(truth.abs().max()),
            )
        )
    return errors


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
