"""The op `bcast`: mathematics, every backend against fp64, and the contract with PyTorch."""

from __future__ import annotations

import pytest
import torch
from bcast_cases import AWKWARD, CASES, PAPER, Case, assert_at_most_twice_eager, run, small

import cast_kernels
from cast_kernels import backends
from cast_kernels.cpu import bcast as cpu_bcast

KERNELS = ["cpu"]
kernels = pytest.mark.parametrize("backend", KERNELS)


# --- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_reference_in_fp64(case: Case) -> None:
    ours, exact = run(case, torch.float64, "eager"), run(case, torch.float64, None)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("windows", [("time", "space"), ("space-time", "time")], ids="+".join)
def test_reference_gradcheck(windows: tuple[str, str]) -> None:
    case = small(batch=1, frames=2, patches=2, dim=4, bottleneck=4, heads=2, windows=windows, scaled=True)
    module = case.module(torch.float64)
    flat = [p.detach().requires_grad_() for p in module.gathered().flat() if p is not None]
    scales = case.scales(torch.float64)

    def call(spatial: torch.Tensor, temporal: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cast_kernels.reference.bcast(
            spatial, temporal, cast_kernels.Parameters.from_flat(parameters), num_heads=2, windows=windows,
            spatial_scale=scales[0], temporal_scale=scales[1],
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (*case.inputs(torch.float64, grad=True), *flat), fast_mode=True)


@kernels
@pytest.mark.parametrize("case", [*CASES, PAPER], ids=str)
def test_error_against_fp64_is_at_most_twice_eager(backend: str, case: Case) -> None:
    ours, eager, exact = (
        run(case, torch.float32, backend),
        run(case, torch.float32, "eager"),
        run(case, torch.float64, None),
    )
    assert_at_most_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_autocast_error_is_at_most_twice_eager(backend: str) -> None:
    case = small(patches=11, dim=64, bottleneck=32, heads=2)
    exact = run(case, torch.float64, None)
    explicit, ours = run(case, torch.float32, None, torch.bfloat16), run(case, torch.float32, backend, torch.bfloat16)
    assert_at_most_twice_eager(ours, explicit, exact)


@kernels
@pytest.mark.parametrize("case", [CASES[1], CASES[4], small(patches=11, dim=64, bottleneck=32, heads=2)], ids=str)
def test_bf16_error_is_at_most_twice_eager(backend: str, case: Case) -> None:
    """Streams and weights in bfloat16, outputs and gradients too."""
    ours, eager = run(case, torch.bfloat16, backend), run(case, torch.bfloat16, "eager")
    assert_at_most_twice_eager(ours, eager, run(case, torch.float64, None))


@kernels
def test_bf16_keeps_the_streams_as_they_came(backend: str) -> None:
    """For backward: not a widened copy."""
    case, kept = AWKWARD, []
    module = case.module(torch.bfloat16, backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = module(*case.inputs(torch.bfloat16, grad=True))
    assert [x.dtype for x in outputs] == [torch.bfloat16] * 2
    assert {x.dtype for x in kept if x.shape[:1] != (case.batch,) or x.ndim == 4} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_and_stay(dtype: torch.dtype) -> None:
    case = AWKWARD
    outputs = case.module(dtype)(*case.inputs(dtype))
    assert [x.dtype for x in outputs] == [dtype, dtype]
    truth = case.module(torch.float64)(*case.inputs(torch.float64))
    for ours, exact in zip(outputs, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=0.15, rtol=0.1)


@kernels
def test_recompute_trades_memory_for_work_and_changes_no_bit(backend: str) -> None:
    case = small(batch=1, frames=8, patches=196, dim=64, bottleneck=32, heads=2)
    module = case.module(backend=backend)
    gradients, kept = {}, {}
    for recompute in cast_kernels.Recompute:
        module.recompute, sizes = recompute, {}
        inputs = case.inputs(grad=True)
        skip = {x.data_ptr() for x in [*inputs, *module.parameters()]}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, skip=skip, sizes=sizes: (x.data_ptr() in skip or sizes.update({x.data_ptr(): x.nbytes}), x)[1],
            lambda x: x,
        ):
            outputs = module(*inputs)
        gradients[recompute] = torch.autograd.grad(outputs, [*inputs, *module.parameters()], list(outputs))
        kept[recompute] = sum(sizes.values())
    nothing, cheap, everything = (kept[r] for r in cast_kernels.Recompute)
    streams = sum(x.nbytes for x in case.inputs())
    assert everything <= 0.03 * streams  # besides the streams themselves
    assert everything < cheap < 0.5 * nothing
    for recompute, found in gradients.items():
        for x, y in zip(found, gradients[cast_kernels.Recompute.NOTHING], strict=True):
            assert torch.equal(x, y), recompute


def test_recompute_takes_its_three_values_only() -> None:
    for recompute in ("nothing", "cheap", "all", cast_kernels.Recompute.ALL):
        assert cast_kernels.BCAST(recompute=recompute).recompute in {"nothing", "cheap", "all"}
    with pytest.raises(ValueError, match="recompute is 'some'; allowed: 'auto', 'nothing', 'cheap', 'all'"):
        cast_kernels.BCAST(recompute="some")
    case = AWKWARD
    with pytest.raises(ValueError, match="recompute is None"):
        cast_kernels.bcast(*case.inputs(), case.module().gathered(), num_heads=case.heads, recompute=None)  # type: ignore[arg-type]


def test_module_is_the_identity_at_initialisation() -> None:
    module = cast_kernels.BCAST(32, 16, 4, 3, 5)
    spatial, temporal = torch.randn(2, 3, 6, 32), torch.randn(2, 3, 5, 32)
    for before, after in zip((spatial, temporal), module(spatial, temporal), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("directions", "changed"), [(("t2s",), (True, False)), (("s2t",), (False, True)), ((), (False, False))]
)
def test_a_direction_changes_its_own_stream_only(directions: tuple[str, ...], changed: tuple[bool, bool]) -> None:
    case = small(directions=directions)
    inputs = case.inputs()
    outputs = case.module()(*inputs)
    assert tuple(not torch.equal(x, y) for x, y in zip(inputs, outputs, strict=True)) == changed


def test_cls_row_sees_no_attention() -> None:
    """CLS goes down, LayerNorm, GELU, up; it neither attends nor is attended to."""
    case = small(frames=2, patches=5)
    module, (spatial, temporal) = case.module(torch.float64), case.inputs(torch.float64)
    s, t = module(spatial, temporal)
    other_cls = spatial.clone()
    other_cls[:, :, 0] += 1.0
    s2, t2 = module(other_cls, temporal)
    assert torch.equal(t, t2)
    assert torch.equal(s[:, :, 1:], s2[:, :, 1:])
    p = module.gathered().spatial
    hidden = torch.nn.functional.layer_norm(
        spatial[:, :, 0] @ p.down_weight.T + p.down_bias, (24,), p.norm_weight, p.norm_bias, 1e-6
    )
    expected = spatial[:, :, 0] + torch.nn.functional.gelu(hidden) @ p.up_weight.T + p.up_bias
    torch.testing.assert_close(s[:, :, 0], expected)


# --- the contract with PyTorch ---------------------------------------------------------------------------------------


def operator_arguments(case: Case, backend: str, grad: bool) -> tuple[object, ...]:
    spatial, temporal = case.inputs(grad=grad)
    flat = [torch.empty(0) if p is None else p.detach().requires_grad_(grad) for p in case.module().gathered().flat()]
    tokens, clips = case.scales()
    scales = (None, None) if tokens is None or clips is None else (tokens, clips[:, None])
    windows = [w if d in case.directions else "" for d, w in zip(cast_kernels.DIRECTIONS, case.windows, strict=True)]
    kept = cpu_bcast.saved_words(case.module().problem(), "cheap") if grad else 0
    return (spatial, temporal, flat, *scales, case.heads, *windows, 1e-6, "cheap", torch.float32, kept, backend)


@kernels
@pytest.mark.parametrize("case", [AWKWARD, small(scaled=True), small(directions=("t2s",), positions=False)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend: str, case: Case, grad: bool) -> None:
    torch.library.opcheck(torch.ops.cast_kernels.bcast, operator_arguments(case, backend, grad), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_compile_fullgraph_with_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    module = AWKWARD.module(backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        inputs, same = (small(batch=batch).inputs(grad=True) for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            got = compiled(*inputs)
        want = module(*same)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)
        torch.autograd.backward(got, got)
        torch.autograd.backward(want, want)
        for x, y in zip(inputs, same, strict=True):
            torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_export_round_trip(backend: str, tmp_path: object) -> None:
    case = AWKWARD
    module = case.module(backend=backend).eval()
    program = torch.export.export(module, case.inputs(), dynamic_shapes=None)
    torch.export.save(program, f"{tmp_path}/bcast.pt2")
    loaded = torch.export.load(f"{tmp_path}/bcast.pt2").module()
    for x, y in zip(loaded(*case.inputs()), module(*case.inputs()), strict=True):
        torch.testing.assert_close(x, y)
    called = {str(node.target) for node in program.graph.nodes}
    assert ("cast_kernels.bcast.default" in called) == (backend != "eager")


@kernels
def test_non_contiguous_and_expanded_inputs(backend: str) -> None:
    case = AWKWARD
    module = case.module(backend=backend)
    spatial, temporal = case.inputs()
    want = module(spatial, temporal)
    strided = (
        spatial.transpose(1, 2).contiguous().transpose(1, 2),
        temporal.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    )
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(module(*strided), want, strict=True):
        assert torch.equal(x, y)
    one = tuple(x[:1].expand(2, -1, -1, -1).detach().requires_grad_() for x in (spatial, temporal))
    out = module(*one)
    # .sum() hands autograd an expanded gradient with stride 0
    sum(x.sum() for x in out).backward()
    assert torch.equal(out[0][0], out[0][1])
    assert torch.equal(one[0].grad[0], one[0].grad[1])
    assert float(one[1].grad.abs().max()) > 0


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_zero_size_batch(backend: str) -> None:
    case = small(batch=0)
    module, inputs = case.module(backend=backend), case.inputs(grad=True)
    outputs = module(*inputs)
    assert [tuple(x.shape) for x in outputs] == [(0, 3, 8, 40), (0, 3, 7, 40)]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in module.parameters())


@kernels
@pytest.mark.parametrize(
    "trained",
    ["none", "inputs", "cross_s_down.weight", "t2s_cross.t2s_q.weight", "cross_t_up.bias", "s2t_cross.clip_space_pos"],
)
def test_frozen_subsets_get_the_same_gradients(backend: str, trained: str) -> None:
    case = AWKWARD
    full = run(case, torch.float32, backend)
    module = case.module(backend=backend)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    inputs = case.inputs(grad=trained == "inputs")
    outputs = module(*inputs)
    assert all(x.requires_grad == (trained != "none") for x in outputs)
    if trained == "none":
        return
    torch.autograd.backward(outputs, case.output_grads())
    got = {f"grad.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    got |= {f"grad.{n}": x.grad for n, x in zip(("spatial", "temporal"), inputs, strict=True) if x.grad is not None}
    assert set(got) == ({"grad.spatial", "grad.temporal"} if trained == "inputs" else {f"grad.{trained}"})
    for name, grad in got.items():
        assert torch.equal(grad.double(), full[name]), name


@kernels
def test_one_output_used_gives_the_gradients_of_that_output(backend: str) -> None:
    case = AWKWARD
    grads = []
    for name in (backend, "eager"):
        module, inputs = case.module(backend=name), case.inputs(grad=True)
        module(*inputs)[0].square().sum().backward()
        grads.append([x.grad for x in inputs] + [p.grad for p in module.parameters() if p.grad is not None])
    for x, y in zip(grads[0][:2], grads[1][:2], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


@kernels
def test_fifty_runs_give_the_same_bits(backend: str) -> None:
    case = small(batch=2, frames=4, patches=33, dim=64, bottleneck=32, heads=4)
    first = run(case, torch.float32, backend)
    for _ in range(49):
        again = run(case, torch.float32, backend)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@kernels
def test_thread_count_does_not_change_a_bit(backend: str) -> None:
    case, threads = small(batch=2, frames=4, patches=33, dim=64, bottleneck=32, heads=4), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@kernels
def test_nothing_is_kept_for_backward_without_grad(backend: str) -> None:
    case = AWKWARD
    packed: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        with torch.no_grad():
            case.module(backend=backend)(*case.inputs(grad=True))
        assert packed == []
        case.module(backend=backend)(*case.inputs(grad=True))
    assert packed


@kernels
def test_flop_formula_equals_what_pytorch_counts(backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for case in CASES[:12]:
        counts = []
        for name in (backend, "eager"):
            with torch.device("meta"):
                module = cast_kernels.BCAST(
                    case.dim,
                    case.bottleneck,
                    case.heads,
                    case.frames,
                    case.patches,
                    case.windows,
                    case.directions,
                    backend=name,
                )
                inputs = (
                    torch.empty(2, case.frames, case.patches + 1, case.dim),
                    torch.empty(2, case.frames, case.patches, case.dim),
                )
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, case


# --- selection and bad input -----------------------------------------------------------------------------------------


def test_explain_names_every_backend_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    case = AWKWARD
    text = cast_kernels.explain(case.module(), *case.inputs())
    assert capsys.readouterr().out.strip() == text
    assert all(name in text for name in backends.BACKENDS)
    assert "runs: cpu" in text
    text = cast_kernels.explain(case.module(torch.float64), *case.inputs(torch.float64))
    assert "float64" in text
    assert "runs: eager" in text


@kernels
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    case = AWKWARD
    with pytest.raises(cast_kernels.BackendError, match="float64"):
        case.module(torch.float64, backend)(*case.inputs(torch.float64))


def test_repr_shows_the_backend_that_runs() -> None:
    assert "backend='auto' -> 'cpu'" in repr(AWKWARD.module())
    assert "backend='auto' -> 'eager'" in repr(AWKWARD.module(torch.float64))
    assert "backend='eager'" in repr(AWKWARD.module(backend="eager"))
