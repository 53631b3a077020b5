"""The whole model for the benchmarks: random weights, results in fp64, a training step, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from groups import KINDS, Kind
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cast
from cast.model.config import make_config

HEADS = {"verb": 97, "noun": 300}

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, seed: int = 0) -> Module:
    """Put reproducible noise on every parameter, so that nothing is multiplied by zero and no gain is one.

    Matrices get noise of unit gain, vectors noise of 0.1. The up-projections of adapters and exchange need this,
    because they start at zero. Two modules with the same parameters on the same device get the same values, whatever
    their old ones. The numbers are drawn on that device.
    """
    parameters = dict(module.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            matrix = parameter.ndim > 1 and not name.endswith("_pos")
            scale = parameter[0].numel() ** -0.5 if matrix else 0.1
            parameter.normal_(1.0 if _is_gain(name, parameter) else 0.0, scale, generator=generator)
    return module


def _is_gain(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 and name.endswith("weight")


def make_model(
    variant: str | cast.CASTConfig = "base", device: torch.device = torch.device("cpu"), **arguments: Any  # noqa: B008
) -> cast.CAST:  # fmt: skip
    """A randomised CAST with EPIC-Kitchens' heads in evaluation mode; equal arguments give equal weights.

    A run makes dozens of models, so this skips the usual initialisation. For CAST-B it takes 1.3 s of a CPU's time. It
    took 11.3 s before: 4.1 for the initialisation and 7.2 for noise drawn on the CPU. If a GPU draws, 0.2 s of Python
    remain.

    Args:
        variant: as `cast.CAST` takes it.
        device: of the weights.
        arguments: further arguments of `cast.CAST`: `fused`, fields of CASTConfig.
    """
    with torch.device("meta"):
        model = cast.CAST(variant, **{"heads": HEADS, **arguments})
    return randomise(model.to_empty(device=device)).eval()


def make_batch(
    config: cast.CASTConfig, batch: int, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """A random video [batch, 3, frames, H, W] and labels [batch] by head."""
    generator = torch.Generator().manual_seed(batch)
    video = torch.randn(batch, 3, config.num_frames, config.image_size, config.image_size, generator=generator)
    labels = {name: torch.randint(n, (batch,), generator=generator) for name, n in config.classes.items()}
    return video.to(device, dtype), {name: x.to(device) for name, x in labels.items()}


class Training:
    """A model's training step: forward, cross-entropy over the heads, backward, AdamW on the trained parameters.

    Args:
        model: has the parameters.
        video, labels: as :func:`make_batch` returns them.
        call: computes the logits; the model itself if None.
        kind: forward runs in its autocast.
        in_graph: whether the optimizer must be capturable by a CUDA graph: fused, its step count on the device.
    """

    def __init__(
        self, model: cast.CAST, video: Tensor, labels: dict[str, Tensor], call: Callable[..., Any] | None = None,
        kind: Kind = KINDS["fp32"], in_graph: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.video, self.labels, self.kind = model.train(), video, labels, kind
        self.call = model if call is None else call
        options: dict[str, Any] = {"fused": True, "capturable": True} if in_graph else {}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, **options)

    def backward(self, clips: int | None = None) -> dict[str, Tensor]:
        """Compute new gradients of the parameters, for the first `clips` if given; returns the logits by head."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.kind.context(self.video.device):
            logits = self.call(self.video[:clips])
        wide = {name: x if x.dtype == torch.float64 else x.float() for name, x in logits.items()}
        losses = [F.cross_entropy(wide[name], label[:clips]) for name, label in self.labels.items()]
        torch.stack(losses).sum().backward()
        return {name: x.detach() for name, x in logits.items()}

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def results(self, clips: int | None = None) -> dict[str, Tensor]:
        """The logits and every gradient, before any optimizer step, of the first `clips` if given.

        The loss is omitted: it is one number, and its error says nothing about the arithmetic.
        """
        named = self.backward(clips)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                named[f"grad.{name}"] = parameter.grad
        return named


def exact_logits(model: cast.CAST, video: Tensor) -> dict[str, Tensor]:
    """The logits in fp64 by PyTorch's own operators. Converts the model to fp64."""
    with torch.no_grad():
        return model.unfuse().double()(video.double())


def exact_training(model: cast.CAST, video: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and gradients in fp64. Each block is computed twice, so that memory holds only one block's activations."""
    model = model.unfuse().double()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return Training(model, video.double(), labels).results()


def count_flops(variant: str | cast.CASTConfig, batch: int, training: bool = False, **arguments: Any) -> int:
    """Floating-point operations of a forward, or of forward and backward, as torch counts them for `fused=False`.

    Counts matrix products and convolutions, two operations per multiply-add. Every clip has the same number, so one
    clip is counted, once for each model in a process: this takes 0.9 s, and 1.5 s with backward.
    """
    return batch * _flops(make_config(variant, **{"heads": HEADS, **arguments}), 1, training)


@cache
def _flops(config: cast.CASTConfig, batch: int, training: bool) -> int:
    """On the meta device, because torch has no formula for the CPU's fused attention."""
    with torch.device("meta"):
        model = cast.CAST(config, fused=False)
    video, labels = make_batch(config, batch, "meta")
    with FlopCounterMode(display=False) as counter:
        if training:
            Training(model, video, labels).backward()
        else:
            with torch.no_grad():
                model(video)
    return counter.get_total_flops()
