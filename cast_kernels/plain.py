"""Whether an op may read a layer's weights instead of calling the layer: the one place that decides.

An op computes what several layers would compute one after the other, from their weights. That is right only as long as
calling each of them would do no more than its class does with plain weights. A layer that was replaced (LoRA, a
quantised one, a compiled one), that has a hook or a `forward` of its own on the instance (offloading), or whose weight
is a tensor subclass or sparse, must be called. What reads its weights as attributes, as parametrizations do, may be
read.

A call of the modules asks :func:`obstacle` first, and where there is one says so with :func:`announce` and calls its
layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

from cast_kernels.compiling import constant
from cast_kernels.problem import BackendError

#: Types of weights that hold their values plainly. Compilers put the last two in the place of the others.
_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))

#: Hooks on every module of the process; torch changes these mappings in place.
_GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def _calls(kind: type[nn.Module]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What calls the `forward` of a class's modules."""
    return kind.__call__, kind._call_impl


#: As PyTorch has it: what replaces one of them wants to see every layer.
_CALLS = _calls(nn.Module)


class Reading(NamedTuple):
    """What an op reads of a module, and what calling the module must come down to.

    A module that has a :class:`Reading` keeps it as its attribute `reading`; linear layers and norms have theirs here.
    """

    forward: Callable[..., Any]
    tensors: tuple[str, ...] = ()  # attributes that the op reads
    absent: tuple[str, ...] = ()  # attributes that must be None, for the op does not read them
    settings: tuple[str, ...] = ()  # attributes that say which tensors are read, and in which order
    layers: Mapping[str, Reading | None] = {}  # submodules; None: as their own `reading` says


LINEAR = Reading(nn.Linear.forward, ("weight", "bias"))
#: A linear layer whose bias lies elsewhere, or that has none.
BARE_LINEAR = Reading(nn.Linear.forward, ("weight",), absent=("bias",))
NORM = Reading(nn.LayerNorm.forward, ("weight", "bias"))


def obstacle(name: str, module: nn.Module | None, reading: Reading | None = None) -> str:
    """Why an op may not read a module's weights, "" if it may.

    Args:
        name: what the answer calls the module.
        module: it and the submodules that `reading` names are looked at; global hooks are not.
        reading: what the op reads of it; its own if None.

    Returns:
        A clause that begins with the name of the layer that must be called: "attention.qkv has a forward hook".
    """
    if module is None:
        return f"{name} is None"
    kind = type(module)
    reading = reading or getattr(module, "reading", None)
    # Attributes rather than `__dict__`: torch.compile guards on what it reads so, and sees a hook that comes later.
    if reading is None or kind.forward is not reading.forward or _calls(kind) != _calls(nn.Module):
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, which computes in a way of its own"
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return f"{name} has a forward of its own on the instance, as offloading sets it"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has a backward hook"
    own = module._parameters
    for field in reading.tensors:
        tensor: Any = own.get(field)
        if type(tensor) not in _TENSORS:
            tensor = getattr(module, field, None)  # a parametrization's, or a view into FSDP's flat parameter
            if tensor is None:
                return f"{name} has no {field}"
            if type(tensor) not in _TENSORS:
                return f"{name}.{field} is a {type(tensor).__qualname__}"
        if tensor.layout is not torch.strided:
            return f"{name}.{field} is laid out as {tensor.layout}"
    for field in reading.absent:
        if own.get(field) is not None or getattr(module, field, None) is not None:
            return f"{name} has a {field}, which the op does not read"
    inside = obstacle_among(module, reading.layers)
    return f"{name}.{inside}" if inside else ""


def obstacle_among(module: nn.Module, layers: Mapping[str, Reading | None]) -> str:
    """The same for submodules of a module that itself is called, by their names in it."""
    children = module._modules
    for name, reading in layers.items():
        found = obstacle(name, children.get(name), reading)
        if found:
            return found
    return ""


class Glance:
    """All tensors that an op reads of some layers, in one quick pass over layers that were found plain before.

    It knows the layers' classes and looks at each call for all that :func:`obstacle` looks for. Whatever it cannot
    vouch for, it leaves to :func:`obstacle`: 14 us for B-CAST's fourteen layers, where that takes 21 and reading the
    attributes 34 (Zen 4).
    """

    def __init__(
        self, children: Mapping[str, nn.Module | None], layers: Mapping[str, Reading | None],
        order: Sequence[str | None] | None = None,
    ) -> None:  # fmt: skip
        """Prepare to read `layers` of `children`, which are plain now.

        Args:
            children: modules by name.
            layers: what is read of which of them, as in :func:`obstacle_among`.
            order: dotted names of the tensors as :meth:`read` is to return them, None for None; as they lie if None.
        """
        self._steps: list[_Step] = []
        self._kinds: dict[type[nn.Module], Callable[..., Any]] = {}
        names: list[str | None] = []
        waiting = [(0, "", children, layers)]
        for parent, path, modules, readings in waiting:
            for name, given in readings.items():
                module: Any = modules[name]
                reading: Reading = given or module.reading
                settings = [(key, module.__dict__[key]) for key in reading.settings]
                own = None if given else module.__dict__.get("reading")
                step = _Step(parent, name, type(module), reading.tensors, reading.absent, own, settings)
                self._steps.append(step)
                self._kinds[type(module)] = reading.forward
                names += [f"{path}{name}.{field}" for field in reading.tensors]
                waiting.append((len(self._steps), f"{path}{name}.", module._modules, reading.layers))
        indices = range(len(names)) if order is None else [-1 if name is None else names.index(name) for name in order]
        self._arranged = itemgetter(*indices)

    def read(self, children: Mapping[str, nn.Module | None]) -> tuple[Any, ...] | None:
        """The tensors, or None: ask :func:`obstacle`."""
        if nn.Module.__call__ is not _CALLS[0] or nn.Module._call_impl is not _CALLS[1] or any(_GLOBAL_HOOKS):
            return None
        for kind, forward in self._kinds.items():
            if kind.forward is not forward or _calls(kind) != _CALLS:
                return None
        modules, found = [children], []
        try:
            for parent, name, kind, tensors, absent, reading, settings in self._steps:
                module = modules[parent][name]
                if type(module) is not kind:
                    return None
                own = module.__dict__
                if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_call_impl" in own:
                    return None
                if own["_backward_hooks"] or own["_backward_pre_hooks"] or own.get("reading") is not reading:
                    return None
                parameters = own["_parameters"]
                for field in tensors:
                    tensor = parameters[field]
                    if type(tensor) not in _TENSORS or tensor.layout is not torch.strided or field in own:
                        return None
                    found.append(tensor)
                for field in absent:
                    if parameters[field] is not None or field in own:
                        return None
                for key, value in settings:
                    if own[key] != value:
                        return None
                modules.append(own["_modules"])
        except KeyError:  # a layer or a parameter has gone, or lies elsewhere
            return None
        found.append(None)
        return self._arranged(found)


class _Step(NamedTuple):
    """One layer of a :class:`Glance`."""

    parent: int  # 0: among the given modules; n: inside the layer of step n - 1
    name: str
    kind: type[nn.Module]
    tensors: tuple[str, ...]
    absent: tuple[str, ...]
    reading: Reading | None  # the instance's own attribute
    settings: list[tuple[str, Any]]


#: Owner -> how its layers are read.
_GLANCES: WeakKeyDictionary[nn.Module, Glance] = WeakKeyDictionary()


def at_a_glance(owner: nn.Module | None, children: Mapping[str, nn.Module | None]) -> tuple[Any, ...] | None:
    """The tensors of layers that :func:`found_plain` told of, or None: ask :func:`obstacle`. Compilers get None."""
    if owner is None or torch.compiler.is_compiling():
        return None
    known = _GLANCES.get(owner)
    return None if known is None else known.read(children)


def found_plain(
    owner: nn.Module, children: Mapping[str, nn.Module | None], layers: Mapping[str, Reading | None],
    order: Sequence[str | None] | None = None,
) -> None:  # fmt: skip
    """Layers have no obstacle now: let :func:`at_a_glance` read them. Arguments as for :class:`Glance`.

    What an op reads as a computed attribute, as parametrizations have it, is no glance's; nothing is remembered then.
    """
    if torch.compiler.is_compiling():
        return
    try:
        known: Glance | None = Glance(children, layers, order)
    except (KeyError, ValueError):  # a setting that is computed, or a table made of two
        known = None
    if known is None or known.read(children) is None:
        _GLANCES.pop(owner, None)
    else:
        _GLANCES[owner] = known


def global_obstacle() -> str:
    """A clause that says what looks at every module of the process, a global hook or a patch, "" if nothing does.

    Hooks of PyTorch's own ModuleTracker, by which FlopCounterMode knows where it is, only look on and do not count.
    """
    calls = _calls(nn.Module)
    if calls != _CALLS and not all(map(_is_of_torch, calls)):
        return "torch.nn.Module.__call__ or _call_impl was replaced, for every module"
    if not any(_GLOBAL_HOOKS):
        return ""
    hooks = [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]
    if all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks):
        return ""
    return "a global hook is on every module"


def _is_of_torch(call: Callable[..., Any]) -> bool:
    """Whether PyTorch defines it. While `torch.export` traces, its own wrapper stands there, and ops are operators."""
    return getattr(call, "__globals__", {}).get("__name__", "").startswith("torch.")


def announce(what: str, backend: str, found: str, owner: nn.Module) -> None:
    """Say that `what` runs by its modules in PyTorch: under "auto" with one warning for each owner and reason.

    Backend "eager" is PyTorch either way and says nothing.

    Args:
        what: the op, in words.
        backend: what was asked for.
        found: what :func:`obstacle` found.
        owner: the module whose warnings are counted.

    Raises:
        BackendError: a kernel was asked for by name.
    """
    if backend == "eager":
        return
    text = verdict(what, backend, found)
    if backend != "auto":
        raise BackendError(text)
    if torch.compiler.is_compiling():
        _warn(text)
    elif _WARNED.get(owner) != found:
        _WARNED[owner] = found
        _warn(text)


def verdict(what: str, backend: str, found: str) -> str:
    """What becomes of an op of which a layer must be called, as a sentence."""
    if backend in ("auto", "eager"):
        return f"{what} runs by its modules in PyTorch, not fused, with the same mathematics: {found}"
    return (
        f"backend={backend!r} cannot run {what}: it reads weights and calls no layer, but {found}. Use backend='auto' "
        "or 'eager', which then call the layers, or put the plain layer back (merge the adapter, remove the hook)."
    )


#: Owner -> the last reason that was warned about.
_WARNED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@constant
def _warn(text: str) -> bool:
    """A warning; under torch.compile one when it traces. It returns something because a constant has to."""
    warnings.warn(text, stacklevel=3)
    return True
