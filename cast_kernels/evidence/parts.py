"""CAST as a list of its parts: embedding, the five ops of a block, heads. Each runs alone, forward and backward.

`cast_kernels` may not import the model, so this repeats the model's composition on the same public ops.
`tests/test_whole_model.py` compares it with `cast.CAST`: the same operators on the same sizes, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import cast_kernels
from cast_kernels import FFNParameters, SelfAttentionParameters
from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.cases import STREAMS

_EPS = 1e-6
_HALF = 0.5  # factor of the adapter beside the FFN


@dataclass(frozen=True)
class Model:
    """Sizes of one CAST, and how it runs. The defaults are CAST-B/16 with EPIC-Kitchens' heads, six clips."""

    batch: int = 6
    training: bool = True
    streams: str = "fp32"  # key of cases.STREAMS; fp32 is autocast's result
    recompute: str = "cheap"
    drop_path: float = 0.2  # in training, in every block except the first
    depth: int = 12
    frames: int = 8  # of the exchange; the video has as many tubelets
    tubelet: int = 2
    grid: int = 14  # patches along a side
    patch: int = 16
    dim: int = 768
    heads: int = 12
    hidden: int = 3072
    adapter: int = 192
    bottleneck: int = 384
    verbs: int = 97
    nouns: int = 300

    @property
    def patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class Part:
    """A part of the model with its tensors, uninitialised."""

    name: str
    times: int  # number of occurrences in the model
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    call: Callable[..., Sequence[Tensor]]  # of the inputs, under autocast
    loss: Callable[..., Sequence[Tensor]] | None = None  # of the outputs, outside autocast

    def forward(self, autocast: torch.dtype | None = None) -> list[Tensor]:
        """The part's outputs, or its loss, under CUDA's autocast rules."""
        with cuda_rules(autocast):
            outputs = self.call(*self.inputs)
        return list(outputs if self.loss is None else self.loss(*outputs))

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """Compute gradients of the inputs and parameters, without keeping them: `backward()` would add or copy them."""
        outputs = [x for x in outputs if x.requires_grad]
        leaves = [x for x in (*self.inputs, *self.parameters) if x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])

    @property
    def trained(self) -> int:
        """Number of trained parameters, over all parts of this kind."""
        return self.times * sum(p.numel() for p in self.parameters if p.requires_grad)


def parts(model: Model, backend: str) -> list[Part]:
    """The model's parts in order. All blocks after the first are equal.

    Args:
        model: the sizes.
        backend: of every op.
    """
    found = [_embedding(model)]
    for times, first in ((1, True), (model.depth - 1, False)):
        if times:
            found += [
                _self_attention("self_attention spatial", model, backend, times, first, spatial=True),
                _self_attention("self_attention temporal", model, backend, times, first, spatial=False),
                _exchange(model, backend, times, first),
                _ffn("ffn spatial", model, backend, times, first, spatial=True),
                _ffn("ffn temporal", model, backend, times, first, spatial=False),
            ]
    return [*found, _heads(model)]


def _frozen(*shape: int) -> Tensor:
    return torch.empty(shape)


def _trained(model: Model, *shape: int) -> Tensor:
    return torch.empty(shape, requires_grad=model.training)


def _stream(model: Model, spatial: bool, requires_grad: bool = True) -> Tensor:
    shape = (model.batch, model.frames, model.patches + spatial, model.dim)
    return torch.empty(shape, dtype=STREAMS[model.streams], requires_grad=model.training and requires_grad)


def _embedding(model: Model) -> Part:
    """The embedding is frozen."""
    dim, side = model.dim, model.grid * model.patch
    video = torch.empty(model.batch, 3, model.frames * model.tubelet, side, side)
    conv2d, cls, table = _frozen(dim, 3, model.patch, model.patch), _frozen(dim), _frozen(1 + model.patches, dim)
    weight, bias = _frozen(dim), _frozen(dim)
    conv3d, bias3d = _frozen(dim, 3, model.tubelet, model.patch, model.patch), _frozen(dim)
    places = _frozen(1, model.frames * model.patches, dim)

    def call(video: Tensor) -> tuple[Tensor, Tensor]:
        frames = video[:, :, model.tubelet - 1 :: model.tubelet].transpose(1, 2).flatten(0, 1)
        tokens = F.conv2d(frames, conv2d, stride=model.patch).flatten(2).transpose(1, 2)
        first = cls.to(tokens.dtype).expand(frames.shape[0], 1, -1)
        spatial = F.layer_norm(torch.cat((first, tokens), dim=1) + table, (dim,), weight, bias, _EPS)
        stride = (model.tubelet, model.patch, model.patch)
        temporal = F.conv3d(video, conv3d, bias3d, stride=stride).flatten(2).transpose(1, 2).contiguous() + places
        kind = STREAMS[model.streams]
        shape = (model.frames, model.patches)
        return spatial.unflatten(0, (-1, shape[0])).to(kind), temporal.unflatten(1, shape).to(kind)

    return Part("embedding", 1, (video,), (conv2d, cls, table, weight, bias, conv3d, bias3d), call)


def _adapter(model: Model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, dim = model.adapter, model.dim
    return (
        _trained(model, width, dim), _trained(model, width), _trained(model, dim, width), _trained(model, dim)
    )  # fmt: skip


def _self_attention(name: str, model: Model, backend: str, times: int, first: bool, spatial: bool) -> Part:
    """The first block's stream has no gradient, because nothing before it trains."""
    dim = model.dim
    biases = [_frozen(3 * dim)] if spatial else [_frozen(dim), _frozen(dim)]  # VideoMAE's keys have no bias
    matrices = (_frozen(3 * dim, dim), _frozen(dim, dim), _frozen(dim))
    norm, adapter = (_frozen(dim), _frozen(dim)), _adapter(model)

    def call(x: Tensor) -> tuple[Tensor]:
        bias = biases[0] if spatial else torch.cat((biases[0], torch.zeros_like(biases[0]), biases[1]))
        p = SelfAttentionParameters(*norm, matrices[0], bias, *matrices[1:], *adapter)
        flat = x.flatten(0, 1) if spatial else x.flatten(1, 2)
        y = cast_kernels.self_attention(
            flat, p, num_heads=model.heads, eps=_EPS, recompute=model.recompute, backend=backend
        )
        return (y.view_as(x),)

    stream = _stream(model, spatial, requires_grad=not first)
    return Part(name, times, (stream,), (*norm, *biases, *matrices, *adapter), call)


def _dropped(model: Model, first: bool, size: int) -> Tensor | None:
    """One draw of drop path."""
    if first or not model.training or not model.drop_path:
        return None
    return torch.empty(size, dtype=STREAMS[model.streams]).bernoulli_(1 - model.drop_path).div_(1 - model.drop_path)


def _exchange(model: Model, backend: str, times: int, first: bool) -> Part:
    with unset_fake_temporarily():  # the module draws its initial weights
        made = cast_kernels.BCAST(
            model.dim, model.bottleneck, model.heads, model.frames, model.patches, backend=backend,
            recompute=model.recompute,
        ).requires_grad_(model.training)  # fmt: skip

    def call(spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
        tokens, clips = _dropped(model, first, 1 + model.patches), _dropped(model, first, model.batch)
        return made(spatial, temporal, None if tokens is None else tokens.expand(model.batch, -1), clips)

    streams = (_stream(model, spatial=True), _stream(model, spatial=False))
    return Part("bcast", times, streams, tuple(made.parameters()), call)


def _ffn(name: str, model: Model, backend: str, times: int, first: bool, spatial: bool) -> Part:
    dim, hidden = model.dim, model.hidden
    norm = (_frozen(dim), _frozen(dim))
    layers = (_frozen(hidden, dim), _frozen(hidden), _frozen(dim, hidden), _frozen(dim))
    parameters = (*norm, *layers, *_adapter(model))
    p = FFNParameters(*parameters)

    def call(x: Tensor) -> tuple[Tensor]:
        factor = _dropped(model, first, 1 + model.patches if spatial else model.batch)
        if factor is not None:
            factor = factor.expand(model.batch, -1)[:, None, :] if spatial else factor[:, None, None]
        y = cast_kernels.ffn(
            x, p, activation="quick_gelu" if spatial else "gelu", eps=_EPS, adapter_scale=_HALF, row_scale=factor,
            recompute=model.recompute, backend=backend,
        )  # fmt: skip
        return (y,)

    return Part(name, times, (_stream(model, spatial),), parameters, call)


def _heads(model: Model) -> Part:
    """Pooling, norms, noun and verb heads, and in training the loss."""
    dim = model.dim
    norms = [(_trained(model, dim), _trained(model, dim)) for _ in range(2)]
    noun, verb = ((_trained(model, n, dim), _trained(model, n)) for n in (model.nouns, model.verbs))
    labels = torch.zeros(model.batch, dtype=torch.int64)

    def call(spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float32
        features = spatial[:, :, 0].mean(1, dtype=wide), temporal.flatten(1, 2).mean(1, dtype=wide)
        s, t = (F.layer_norm(x, (dim,), *norm, _EPS) for x, norm in zip(features, norms, strict=True))
        return F.linear(t, *verb), F.linear(s, *noun)

    def loss(*logits: Tensor) -> tuple[Tensor]:
        first, second = (F.cross_entropy(x.float(), labels) for x in logits)
        return (first + second,)

    streams = (_stream(model, spatial=True), _stream(model, spatial=False))
    parameters = (*norms[0], *norms[1], *noun, *verb)
    return Part("heads", 1, streams, parameters, call, loss if model.training else None)
