"""What backend `triton` has before attention: LayerNorm and queries, keys, values; three gradients and no copy of them.

tests/interpreted/test_interpreted_experts.py runs its kernels and their contract with PyTorch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ffn_cases
import pytest
import torch
from bcast_cases import assert_at_most_twice_eager
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Launcher, Recorder, offline_driver
from ptx_emulator.triton.launcher import Emulator
from self_attention_cases import Case, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_kernels import EMULATED

import cast_kernels
from cast_kernels import SelfAttentionParameters, attention
from cast_kernels.evidence.cases import poisoned_memory
from cast_kernels.evidence.compile import read
from cast_kernels.evidence.gates import EXCEPTIONS, judge
from cast_kernels.ops import self_attention
from cast_kernels.ops._signatures import Signatures
from cast_kernels.problem import Verdict
from cast_kernels.triton import adapter as triton_adapter
from cast_kernels.triton import ffn as triton_ffn
from cast_kernels.triton import projection as triton_projection

BF16 = torch.bfloat16
TARGETS = ("sm_80", "sm_90")
SMALL = Case(batch=2, tokens=37, dim=96, heads=3, adapter=48)
ADAPTER = SelfAttentionParameters._fields[6:]
TRUNK = SelfAttentionParameters._fields[:6]


@pytest.fixture(autouse=True)
def fill() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True


def launched(name: str, launcher: Launcher, case: Case, cache: Path, **options: Any) -> dict[str, Tensor]:
    with offline_driver(target(name), launcher, cache), poisoned_memory():
        return run(case, options.pop("dtype", torch.float32), "triton", **options)


# --- compiled code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_norms_compile_within_the_gates_at_the_papers_width(name: str, tmp_path: Path) -> None:
    recorder = Recorder()
    for wanted in (None, ("x", *ADAPTER)):
        launched(
            name, recorder, Case(batch=1, tokens=130, dim=768, heads=12, adapter=192), tmp_path, autocast=BF16,
            wanted=wanted,
        )  # fmt: skip
    rows = [judge(read(r.first, "bf16", ["the paper's width"]), EXCEPTIONS) for r in recorder.records.values()]
    norms = [row for row in rows if row.kernel.startswith("norm")]
    assert Counter(row.kernel for row in norms) == {"norm": 1, "norm_backward": 2}
    assert all(row.failures == () for row in norms), norms


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("autocast", [None, BF16], ids=str)
def test_compiled_code_is_right_in_emulation(name: str, autocast: torch.dtype | None, tmp_path: Path) -> None:
    emulator, dtype = Emulator(), BF16 if autocast is None else torch.float32
    ours = launched(name, emulator, SMALL, tmp_path, dtype=dtype, autocast=autocast)
    eager, exact = run(SMALL, dtype, "eager", autocast=autocast), run(SMALL, torch.float64, None)
    assert_at_most_twice_eager(ours, eager, exact)
    assert {kernel: runs.launches for kernel, runs in emulator.runs.items()} == {
        "norm": 2, "norm_backward": 1, "adapter_forward": 1, "adapter_backward": 1, "weight_gradient": 1,
        "sum_parts": 1, "reduce_rows": 2, **({} if autocast is None else {"cast": 2}),
    }  # fmt: skip


# --- what is not computed and not copied -----------------------------------------------------------------------------

PAPER = Case(batch=2, tokens=197, dim=768, heads=12, adapter=192)
PROJECTED = ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias")
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


class Passes(TorchDispatchMode):
    """Name and bytes of every operator that reads or writes memory, PyTorch's or ours.

    And the gradients that are asked of `projection_backward`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.cast_kernels.projection_backward.default:
            self.asked += [name for name, want in zip(PROJECTED, args[-1], strict=True) if want]
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        unread = func.namespace == "prim" or any(word in str(func) for word in ("empty", "_unsafe_view", "detach"))
        if not view and not unread:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.seen.append((str(func.overloadpacket), sum(x.numel() * x.element_size() for x in tensors)))
        return out


def operators(wanted: tuple[str, ...], backend: str = "triton", name: str = "auto") -> tuple[Passes, Passes]:
    """Those of forward and of backward under AMP, on tensors without memory."""
    with offline_driver(target("sm_90"), Recorder()), FakeTensorMode(allow_non_fake_inputs=True):
        leaves = {"x": torch.empty(2, 197, 768)}
        leaves |= {key: torch.empty(p.shape) for key, p in PAPER.parameters()._asdict().items()}
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        x, *parameters = leaves.values()
        with Passes() as forward, torch.autocast("cpu", BF16):
            y = cast_kernels.self_attention(
                x, SelfAttentionParameters(*parameters), num_heads=12, eps=1e-5, backend=backend, attention=name
            )
        with Passes() as backward:
            y.backward(torch.empty_like(y))
    assert {key for key, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
    return forward, backward


def names(passes: Passes) -> list[str]:
    return [name for name, _ in passes.seen]


def test_of_a_frozen_trunk_nothing_but_the_way_back_is_computed() -> None:
    forward, backward = operators(("x", *ADAPTER))
    assert names(forward) == [
        "aten._foreach_copy_", "cast_kernels.projection", FLASH, "aten.addmm", "cast_kernels.adapter",
    ]  # fmt: skip
    assert names(backward) == [
        "cast_kernels.adapter_backward", "aten.mm", f"{FLASH}_backward", "cast_kernels.projection_backward",
    ]  # fmt: skip
    _, first_block = operators(ADAPTER)
    assert names(first_block) == ["cast_kernels.adapter_backward"]


def test_bytes_between_attention_and_the_stream() -> None:
    """Behind attention's backward, in bytes a row and channel: eager's operators, and the one in their place."""

    def moved(backend: str) -> float:
        _, backward = operators(("x", *ADAPTER), backend)
        start = names(backward).index(f"{FLASH}_backward") + 1
        return sum(size for _, size in backward.seen[start:]) / (2 * 197 * 768)

    weight = 3 * 768 / (2 * 197)  # of one byte an element
    assert moved("eager") - 2 * weight == pytest.approx(50, abs=0.3)
    assert moved("triton") - 2 * weight == pytest.approx(
        18, abs=0.3
    )  # three gradients, x, dY in, dX out; inside, 12 of dn


@pytest.mark.parametrize("name", ["sdpa", "math", "flash-attn", "xformers"])
def test_every_attention_keeps_its_layout_and_its_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def attend(*qkv: Tensor) -> Tensor:
        shapes.append([tuple(x.shape) for x in qkv])
        q, k, v = qkv[0].unbind(2) if len(qkv) == 1 else qkv
        return attention.attend_apart("sdpa", q, k, v)

    for package, function in (
        ("flash_attn", "flash_attn_qkvpacked_func"),
        ("xformers.ops", "memory_efficient_attention"),
    ):
        module = ModuleType(package)
        setattr(module, function, attend)
        monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setattr(attention, "can_run", lambda *_: Verdict(True, "a stand-in"))
    _, backward = operators(("x", *TRUNK, *ADAPTER), name=name)
    head = (2, 197, 12, 64)
    assert shapes == {"flash-attn": [[(2, 197, 3, 12, 64)]], "xformers": [[head] * 3]}.get(name, [])
    if name in ("sdpa", "xformers"):
        assert not {"aten.stack", "aten.cat", "aten.clone", "aten.copy_"} & set(names(backward))


WANTED = [("qkv_weight",), ("qkv_bias",), ("norm_weight", "norm_bias"), ("x",)]


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_no_gradient_is_computed_that_nobody_wants(wanted: tuple[str, ...]) -> None:
    _, backward = operators((*wanted, *ADAPTER))
    assert tuple(backward.asked) == wanted


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_do_not_depend_on_how_they_come(
    wanted: tuple[str, ...], packed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One packed gradient, or three: the same numbers, and nothing but what is wanted."""
    monkeypatch.setattr(self_attention.OPERATOR, "_known", Signatures())
    if packed:
        monkeypatch.setattr(attention, "PACKED", ("sdpa",))
    case = replace(SMALL, batch=1, tokens=5)
    exact, eager = (run(case, dtype, name, wanted=wanted) for dtype, name in ((torch.float64, None), (BF16, "eager")))
    ours = launched("sm_80", Emulator(), case, tmp_path, dtype=BF16, wanted=wanted)
    assert_at_most_twice_eager(ours, eager, exact)
    assert set(ours) == {"y", *(f"grad.{name}" for name in wanted)}


# --- casts -----------------------------------------------------------------------------------------------------------


def half_block(op: str, level: str, trained: tuple[str, ...], cache: Path) -> tuple[Any, Recorder]:
    """Forward and backward under AMP -> the parameters, of which those named have gradients, and all launches."""
    case: Any = SMALL if op == "self_attention" else ffn_cases.Case(lead=(37,), dim=96, hidden=64, adapter=48)
    parameters, x = case.parameters(), case.x().requires_grad_()
    for name in trained:
        getattr(parameters, name).requires_grad_()
    options: dict[str, Any] = {"num_heads": case.heads} if op == "self_attention" else {}
    with offline_driver(target("sm_80"), Recorder(), cache) as recorder:
        with torch.autocast("cpu", BF16):
            y = getattr(cast_kernels, op)(x, parameters, eps=1e-5, backend="triton", recompute=level, **options)
        y.sum().backward()
    return parameters, recorder


@pytest.mark.parametrize("op", ["ffn", "self_attention"])
def test_a_trained_weight_keeps_its_gradient_where_all_is_kept(op: str, tmp_path: Path) -> None:
    """What is cast before the op is out of autograd's sight."""
    names = (ffn_cases.FFNParameters if op == "ffn" else SelfAttentionParameters)._fields
    parameters, _ = half_block(op, "nothing", names, tmp_path)
    assert [name for name in names if getattr(parameters, name).grad is None] == []


@pytest.mark.parametrize("op", ["ffn", "self_attention"])
@pytest.mark.parametrize(("level", "times"), [("nothing", 1), ("cheap", 1), ("all", 2)])
def test_a_frozen_weight_is_cast_once_a_step_where_anything_is_kept(
    op: str, level: str, times: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a trained one once in forward and once in backward, in the adapter's plan."""
    launches: list[list[int]] = []
    true = torch._foreach_copy_

    def copy(to: list[Tensor], given: list[Tensor]) -> None:
        launches.append([t.data_ptr() for t in given])
        true(to, given)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    parameters, recorder = half_block(op, level, ADAPTER, tmp_path)
    copied = Counter(address for launch in launches for address in launch)
    frozen = [p for name, p in parameters._asdict().items() if name not in ADAPTER and not name.startswith("norm")]
    in_product = op == "self_attention" and level == "all"  # the node behind attention keeps its cast for backward
    for p in frozen:
        elsewhere = in_product and (p is parameters.proj_weight or p is parameters.proj_bias)
        assert copied[p.data_ptr()] <= (0 if elsewhere else times)
        assert copied[p.data_ptr()] == times or p.ndim == 1 or elsewhere  # backward needs few biases
    (cast,) = (record for record in recorder.records.values() if record.first.kernel == "cast")
    assert len(cast.grids) == 2  # the adapter's matrices
    assert len(launches) == times


# --- edges that only show on a device --------------------------------------------------------------------------------


def step(op: str, rows: int, autocast: torch.dtype | None = BF16) -> None:
    """Forward and backward of one half block."""
    if op == "ffn":
        ffn_cases.run(
            ffn_cases.Case(lead=(rows,), dim=96, hidden=64, adapter=48), torch.float32, "triton", autocast=autocast
        )
    else:
        run(replace(SMALL, batch=1, tokens=rows), torch.float32, "triton", autocast=autocast)


@pytest.mark.parametrize("op", ["ffn", "self_attention"])
def test_another_batch_size_compiles_nothing(op: str, tmp_path: Path) -> None:
    """Neither 1 nor a multiple of 16 makes kernels of their own."""
    with offline_driver(target("sm_80"), Recorder(), tmp_path) as recorder:
        step(op, 37)
        known = set(recorder.records)
        for rows in (38, 48, 64, 1, 1000):
            step(op, rows)
        assert set(recorder.records) == known


def test_an_empty_batch_launches_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    found = launched("sm_80", recorder, replace(SMALL, batch=0), tmp_path, autocast=BF16)
    assert recorder.records == {}
    assert found["y"].shape == (0, 37, 96)
    assert set(found) == {"y", "grad.x", *(f"grad.{name}" for name in (*TRUNK, *ADAPTER))}
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)])
def test_batch_and_tokens_may_have_more_dimensions(dims: tuple[int, int], tmp_path: Path) -> None:
    """The same bits as of the flat stream, and what does not fit is refused."""
    x = torch.randn(2, 3, 5, 96)
    entries = (6, 5) if dims == (2, 1) else (2, 15)
    results = []
    with offline_driver(target("sm_80"), Emulator(), tmp_path):
        for backend in ("triton", "eager"):
            for shape, how in ((x.shape, dims), ((*entries, 96), (1, 1))):
                stream = x.reshape(shape).requires_grad_()
                y = cast_kernels.self_attention(
                    stream, SMALL.parameters(), num_heads=3, eps=1e-5, dims=how, backend=backend
                )
                y.backward(x.reshape(shape))
                assert y.shape == stream.shape
                assert stream.grad is not None
                results.append((y.detach().flatten(), stream.grad.flatten()))
    for got, want in (results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=r"must be \[batch, tokens, D\], with dims=\(1, 1\) of 3 dimensions"):
        cast_kernels.self_attention(x, SMALL.parameters(), num_heads=3, eps=1e-5)


class Journal:
    """Whether each launch came inside of `watch`."""

    enforces_limits = True

    def __init__(self) -> None:
        self.inside: list[bool] = []
        self.depth = 0

    def launch(self, _: Launch) -> None:
        self.inside.append(self.depth > 0)

    @contextmanager
    def watch(self, _: Tensor) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1


@pytest.mark.parametrize("op", ["ffn", "self_attention"])
def test_every_launch_is_on_the_streams_device(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offline_driver(target("sm_80"), Journal(), tmp_path) as journal:
        for module in (triton_adapter, triton_ffn, triton_projection):
            monkeypatch.setattr(module, "on_device", journal.watch)
        step(op, 37)
    assert len(journal.inside) > 6
    assert all(journal.inside)
