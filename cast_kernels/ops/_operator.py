"""Base of all ops: the pair of registered operators that kernel backends share, and the direct call that bypasses them.

An op's file subclasses :class:`Operator` and defines names, sizes, and the calls of a backend. The base derives schema,
fake kernels, autograd, the FLOP formulas, and the memory of checked calls.

A call takes one of two ways. Through PyTorch's dispatcher compilers, modes, transforms and profilers see it. If none of
these is active, it goes straight to the backend, which saves six passes over thirty tensors. Both ways run the same
backend on the same tensors, under the same node of autograd.

The operators' arguments: the streams, `parameters`, the factors, the op's options, and for all ops

- `recompute` and `compute`: a value of `Recompute`, and the dtype of dense products' operands;
- `kept`: the 4-byte words that the backend keeps for backward, a unit of the op; 0 if no backward will follow. As an
  argument it is part of a compiled graph's identity: inductor must not reuse a graph from disk with another layout of
  `saved`;
- `backend`: the name.

They return the outputs and `saved`, which only the backend reads. An absent parameter is an empty tensor, because
autograd takes no None inside a list of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from cast_kernels import backends
from cast_kernels.ops import _derivatives
from cast_kernels.ops._checks import autocast_dtype
from cast_kernels.ops._signatures import Alike, Signatures, listed, unobserved, watched

_LIBRARY = torch.library.Library(_derivatives.NAMESPACE, "DEF")
_TAGS = (torch.Tag.needs_contiguous_strides,)
#: The last arguments of every forward operator.
_COMMON = ("str recompute", "ScalarType compute", "SymInt kept", "str backend")


class Call(NamedTuple):
    """A call without its tensors."""

    options: tuple[Any, ...]  # the op's own, in the order of the schema
    recompute: str
    compute: torch.dtype
    kept: int
    backend: str
    problem: Any = None  # None if the operator derives it from its arguments

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the forward operator."""
        return *self.options, self.recompute, self.compute, self.kept, self.backend


class Checked:
    """A call that passed the op's checks, with the decisions that hold for every call like it."""

    __slots__ = ("backward", "call", "differentiated", "frozen", "inner", "kernels")
    call: Call
    differentiated: bool

    def __init__(self, call: Call, kernels: backends.Backend | None, differentiated: bool) -> None:
        self.call, self.differentiated = call, differentiated
        self.kernels: backends.Backend | None = kernels  # the backend, if only autograd observes the call
        self.frozen: tuple[int, ...] = ()  # indices of parameters to cast before the call, see `_casts`
        self.inner: Checked | None = None  # of the inner op, if the backend composes ops
        self.backward: Alike[bool] = Alike()  # known backward calls, by kept tensors and the outputs' gradients


class Operator:
    """Base of the ops' operators; an instance registers them. Subclasses define the attributes without a value here."""

    name: str
    streams: tuple[str, ...]  # tensors that may want a gradient, besides the parameters
    read: int  # backward reads the first `read` streams; the gradient of the others is that of the first output
    factors: tuple[str, ...] = ()  # constant tensors, or None
    options: tuple[str, ...]  # types and names
    outputs: tuple[str, ...]
    composed: tuple[str, ...] = ("eager",)  # backends of PyTorch's operators, which need none of ours

    def problem(
        self, streams: Sequence[Tensor], flat: Sequence[Tensor | None], options: tuple[Any, ...], recompute: str,
        compute: torch.dtype,
    ) -> Any:  # fmt: skip
        """The problem of the operator's arguments. For backward, `streams` holds the streams that it reads, then the
        outputs' gradients."""
        raise NotImplementedError

    def pack(self, flat: Sequence[Tensor | None]) -> Any:
        """The op's parameters from the list of them."""
        raise NotImplementedError

    def kept(self, kernels: Any, problem: Any, recompute: str) -> int:
        """4-byte words a unit that the backend keeps for backward."""
        raise NotImplementedError

    def shapes(self, streams: Sequence[Tensor], options: tuple[Any, ...]) -> list[tuple[Tensor, Sequence[int]]]:
        """For each output a tensor of its dtype and device, and its shape."""
        return [(streams[-1], streams[-1].shape)]

    def saved_shape(self, streams: Sequence[Tensor], kept: int) -> tuple[int, ...]:
        """The shape of `saved`: units times words."""
        raise NotImplementedError

    def forward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Call the backend: the outputs, and `saved`."""
        raise NotImplementedError

    def backward(
        self, kernels: Any, call: Call, streams: Sequence[Tensor], parameters: Any, saved: Tensor,
        factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Call the backend: gradients of the streams that backward reads and of the parameters, None for unwanted ones.

        Args:
            grads: of each output.
            wanted: for each of these streams and parameters, whether to compute it.
        """
        raise NotImplementedError

    def flops(self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...]) -> int:
        """Of the shapes; two per multiply-add, matrix products only, as torch counts them."""
        raise NotImplementedError

    def backward_flops(
        self, streams: Sequence[Any], flat: Sequence[Any], options: tuple[Any, ...], wanted: Sequence[bool]
    ) -> int:
        """The products that autograd would run for the wanted gradients, without recomputation."""
        raise NotImplementedError

    # ---- calls ------------------------------------------------------------------------------------------------------

    def __init__(self) -> None:
        self._known: Signatures[Checked] = Signatures()
        self._register()

    def recall(self, arguments: tuple[Any, ...], tensors: Sequence[Any]) -> Checked | None:
        """The decisions for a call like this one, or None: then check it.

        Args:
            arguments: of the public function besides tensors.
            tensors: all of them :func:`listed`, the first stream first.
        """
        if torch.compiler.is_compiling() or not isinstance(tensors[0], Tensor):
            return None
        return self._known.find(self._circumstances(arguments, tensors[0]), tensors)

    def settle(
        self, arguments: tuple[Any, ...], tensors: Sequence[Tensor], problem: Any, backend: str, recompute: str,
        options: tuple[Any, ...],
    ) -> Checked:  # fmt: skip
        """Decide how a checked call runs, and remember it.

        Args:
            arguments, tensors: as for :meth:`recall`.
            problem: of these arguments.
            backend: the selected one.
            recompute: a value of `Recompute`.
            options: as the operator takes them.
        """
        differentiated = _derivatives.may_be_differentiated(tensors)
        kernels = backends.load(backend, self.name)
        keeps = differentiated and backend not in self.composed
        kept = self.kept(kernels, problem, recompute) if keeps else 0
        call = Call(options, recompute, problem.compute, kept, backend, problem)
        if torch.compiler.is_compiling() or not unobserved(tensors):
            return Checked(call, None, differentiated)
        found = Checked(call, kernels, differentiated)
        self._known.add(self._circumstances(arguments, tensors[0]), tensors, found)
        return found

    def _circumstances(self, arguments: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
        return arguments, torch.is_grad_enabled(), autocast_dtype(x), backends.circumstances()

    def run(
        self, checked: Checked, streams: Sequence[Tensor], parameters: Any, flat: Sequence[Tensor | None],
        factors: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs, and `saved`. Under autocast dtypes may be mixed: kernels take each tensor in its own dtype."""
        call, kernels = checked.call, checked.kernels
        if kernels is None or watched():
            return self._overload(*streams, _filled(flat, streams[0]), *factors, *call.arguments())
        if not checked.differentiated:
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(kernels, call, streams, parameters, factors)

        def run(own_streams: Sequence[Tensor], _: Sequence[Tensor | None], own_factors: Sequence[Tensor | None]) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(kernels, call, own_streams, parameters, own_factors)

        return _Node.apply(self, call, checked, run, *streams, *flat, *factors)  # type: ignore[attr-defined]

    def gradients(
        self, call: Call, checked: Checked | None, tensors: Sequence[Tensor], grads: Sequence[Tensor | None],
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:  # fmt: skip
        """One gradient for each of the streams that backward reads and of the parameters.

        Args:
            checked: the call, if it went straight to the backend.
            tensors: these streams, parameters, factors, and `saved`.
            grads: of the outputs, None for an unused one.
            wanted: for each gradient, whether to compute it.
        """
        if not any(wanted):
            return [None] * len(wanted)
        streams, flat = tensors[: self.read], tensors[self.read : len(wanted)]
        factors, saved = tensors[len(wanted) : -1], tensors[-1]
        given = self._whole(grads, streams, call.options)
        if checked is not None and straight_back(checked, tensors, given):
            with torch._C._AutoDispatchBelowAutograd():
                found = self.backward(
                    checked.kernels, call, streams, self.pack(flat), saved, factors, given, wanted
                )  # fmt: skip
            return list(found)
        found = iter(
            self._backward_overload(
                *streams, _filled(flat, streams[0]), saved, *factors, *given, *call.options, call.recompute,
                call.compute, wanted, call.backend,
            )
        )  # fmt: skip
        return [next(found) if want else None for want in wanted]

    def _whole(
        self, grads: Sequence[Tensor | None], streams: Sequence[Tensor], options: tuple[Any, ...]
    ) -> list[Tensor]:
        """Zeros for an unused output: kernels read the gradient of each stream that received something."""
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return present
        shapes = self.shapes(streams, options)
        return [x.new_zeros(shape) if g is None else g for g, (x, shape) in zip(grads, shapes, strict=True)]

    # ---- registration -----------------------------------------------------------------------------------------------

    def _register(self) -> None:
        name = f"{_derivatives.NAMESPACE}::{self.name}"
        tensors, read = [f"Tensor {s}" for s in self.streams], [f"Tensor {s}" for s in self.streams[: self.read]]
        factors, grads = [f"Tensor? {f}" for f in self.factors], [f"Tensor grad_{y}" for y in self.outputs]
        forward = [*tensors, "Tensor[] parameters", *factors, *self.options, *_COMMON]
        common = [*self.options, *_COMMON[:2], "bool[] wanted", _COMMON[3]]
        backward = [*read, "Tensor[] parameters", "Tensor saved", *factors, *grads, *common]
        results = ", ".join(["Tensor"] * (len(self.outputs) + 1))
        _LIBRARY.define(f"{self.name}({', '.join(forward)}) -> ({results})", tags=_TAGS)
        _LIBRARY.define(f"{self.name}_backward({', '.join(backward)}) -> Tensor[]", tags=_TAGS)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._forward, key)
            _LIBRARY.impl(f"{self.name}_backward", self._backward, key)
        torch.library.register_fake(name, self._forward_fake, lib=_LIBRARY)
        torch.library.register_fake(f"{name}_backward", self._backward_fake, lib=_LIBRARY)
        _derivatives.register(_LIBRARY, self.name, self._differentiate)
        operators = getattr(torch.ops, _derivatives.NAMESPACE)
        packets = [getattr(operators, own) for own in (self.name, f"{self.name}_backward")]
        self._overload, self._backward_overload = (packet.default for packet in packets)
        register_flop_formula(packets[0])(self._forward_flops)
        register_flop_formula(packets[1])(self._backward_flops)

    def _split(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Streams, parameters, factors and the rest of the forward operator's arguments."""
        streams, factors = len(self.streams), len(self.factors)
        rest = streams + 1 + factors
        return list(inputs[:streams]), inputs[streams], list(inputs[streams + 1 : rest]), list(inputs[rest:])

    def _split_backward(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], Any, list[Any], list[Any], Any]:
        """Streams, parameters, saved, factors, the outputs' gradients, and the rest."""
        read, factors, outputs = self.read, len(self.factors), len(self.outputs)
        first = read + 2
        grads, rest = first + factors, first + factors + outputs
        middle = list(inputs[first:grads]), list(inputs[grads:rest])
        return list(inputs[:read]), inputs[read], inputs[read + 1], *middle, list(inputs[rest:])

    def _posed(
        self, streams: Sequence[Tensor], flat: list[Tensor], rest: list[Any]
    ) -> tuple[Call, list[Tensor | None]]:
        """The call, with its problem, and the parameters with None for those that are absent."""
        *options, recompute, compute, kept, backend = rest
        problem = self.problem(streams, flat, tuple(options), recompute, compute)
        present = [p if p.numel() else None for p in flat]
        return Call(tuple(options), recompute, compute, kept, backend, problem), present

    def _forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        streams, flat, factors, rest = self._split(inputs)
        call, present = self._posed(streams, flat, rest)
        return self.forward(backends.load(call.backend, self.name), call, streams, self.pack(present), factors)

    def _forward_fake(self, *inputs: Any) -> tuple[Tensor, ...]:
        streams, _, _, rest = self._split(inputs)
        *options, _, _, kept, _ = rest
        outputs = [x.new_empty(shape) for x, shape in self.shapes(streams, tuple(options))]
        return *outputs, streams[0].new_empty(self.saved_shape(streams, kept), dtype=torch.float32)

    def _backward(self, *inputs: Any) -> list[Tensor]:
        streams, flat, saved, factors, grads, rest = self._split_backward(inputs)
        *options, recompute, compute, wanted, backend = rest
        call, present = self._posed([*streams, *grads], flat, [*options, recompute, compute, 0, backend])
        kernels, parameters = backends.load(backend, self.name), self.pack(present)
        found = self.backward(kernels, call, streams, parameters, saved, factors, grads, tuple(wanted))
        return [grad for grad in found if grad is not None]

    def _backward_fake(self, *inputs: Any) -> list[Tensor]:
        streams, flat, *_, rest = self._split_backward(inputs)
        return [x.new_empty(x.shape) for x, want in zip([*streams, *flat], rest[-2], strict=True) if want]

    def _differentiate(self, run: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The operator's call as a node of autograd's graph; `run` is the operator below autograd."""
        streams, flat, factors, rest = self._split(inputs)
        *options, recompute, compute, kept, backend = rest

        def below(own_streams: Sequence[Tensor], own_flat: Sequence[Any], own_factors: Sequence[Any]) -> Any:
            return _derivatives.below_autograd(lambda: run(*own_streams, list(own_flat), *own_factors, *rest))

        call = Call(tuple(options), recompute, compute, kept, backend)
        return _Node.apply(self, call, None, below, *streams, *flat, *factors)  # type: ignore[attr-defined]

    def _forward_flops(self, *inputs: Any, **kwargs: Any) -> int:
        streams, flat, _, rest = self._split(inputs)
        return self.flops(streams, flat, tuple(rest[: len(self.options)]))

    def _backward_flops(self, *inputs: Any, **kwargs: Any) -> int:
        streams, flat, *_, rest = self._split_backward(inputs)
        return self.backward_flops(streams, flat, tuple(rest[: len(self.options)]), rest[-2])


class _Node(_SingleLevelFunction):
    """One call in autograd's graph. Tensors are separate arguments, because autograd finds none inside a list.

    Not a `torch.autograd.Function`: it would pass the call to the dispatcher of `torch.func`, which has already called
    this node.
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, call: Call, checked: Checked | None, run: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        streams, end = len(operator.streams), len(tensors) - len(operator.factors)
        output = run(tensors[:streams], tensors[streams:end], tensors[end:])
        ctx.save_for_backward(*tensors[: operator.read], *tensors[streams:], output[-1])
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.call, ctx.checked = operator, call, checked
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        operator: Operator = ctx.operator
        wanted, grads = ctx.needs_input_grad[4:], grads[:-1]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        streams, factors = len(operator.streams), len(operator.factors)
        asked = (*wanted[: operator.read], *wanted[streams : len(wanted) - factors])
        found = operator.gradients(ctx.call, ctx.checked, ctx.saved_tensors, grads, asked)
        passed = [grads[0] if want else None for want in wanted[operator.read : streams]]
        head = (None,) * 4
        return *head, *found[: operator.read], *passed, *found[operator.read :], *(None,) * factors


def _filled(flat: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The parameters, with one empty tensor in place of each absent one."""
    if all(p is not None for p in flat):
        return list(flat)  # type: ignore[arg-type]
    absent = like.new_empty(0)
    return [absent if p is None else p for p in flat]


def straight_back(checked: Checked, kept: Sequence[Tensor | None], grads: Sequence[Tensor]) -> bool:
    """Whether backward may go straight to the backend: nothing observes it, not even autograd for a second
    derivative."""
    if torch.is_grad_enabled() or watched() or torch.compiler.is_compiling():
        return False
    tensors = listed(*kept, *grads)
    if not checked.backward.find(tensors):
        if not unobserved(tensors):
            return False
        checked.backward.add(tensors, True)
    return True


def flat_scale(scale: Tensor | None) -> Tensor | None:
    """[...] as [rows], None as None."""
    return scale if scale is None or scale.ndim == 1 else scale.reshape(-1)
