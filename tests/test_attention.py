"""Which attention kernel runs: the choice, its reasons, its way from the model, and the packages' layouts."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from self_attention_cases import Case, run
from torch import Tensor
from torch.nn.attention import SDPBackend

import cast_kernels
from cast import CAST
from cast_kernels import attention, backends
from cast_kernels.problem import Recompute, SelfAttentionProblem

CPU = Case().problem()
GPU = SelfAttentionProblem(48, 197, 768, 12, 192, Recompute.CHEAP, torch.bfloat16, "cuda")
PACKAGES = ("flash-attn", "xformers")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins with the packages' layouts, [batch, tokens, heads, head_dim]; lists which ran."""
    ran: list[str] = []

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ran.append(name)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    flash.flash_attn_qkvpacked_func = lambda qkv: attend("flash-attn", *qkv.unbind(2))  # type: ignore[attr-defined]
    ops.memory_efficient_attention = lambda q, k, v: attend("xformers", q, k, v)  # type: ignore[attr-defined]
    xformers.ops = ops  # type: ignore[attr-defined]
    for module in (flash, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return ran


def test_auto_is_pytorchs_own_everywhere() -> None:
    assert attention.select(CPU) == attention.select(GPU) == "sdpa"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, str(attention.ATTENTIONS[name]).split(".")[0], None)
    with pytest.raises(cast_kernels.BackendError, match=f"cannot be imported.*pip install {name}"):
        attention.select(replace(GPU, attention=name))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", PACKAGES)
def test_an_installed_package_is_taken_when_asked_for(name: str) -> None:
    assert attention.select(replace(GPU, attention=name)) == name
    assert attention.select(GPU) == "sdpa"


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "the stream is on cpu; flash-attn runs on cuda"),
        ({"dtype": torch.float32}, r"compute dtype is torch.float32; flash-attn takes torch.float16, torch.bfloat16$"),
        ({"num_heads": 64}, "heads have 12 channels; a multiple of 8"),
        ({"num_heads": 2}, "heads have 384 channels; a multiple of 8 up to 256"),
    ],
)
def test_a_package_that_cannot_run_the_problem_says_why(change: dict[str, object], reason: str) -> None:
    verdict = attention.can_run("flash-attn", replace(GPU, **change))  # type: ignore[arg-type]
    assert not verdict.ok
    assert re.search(reason, verdict.reason), verdict.reason


@pytest.mark.usefixtures("packages")
def test_autocast_counts_and_xformers_takes_float32() -> None:
    problem = replace(GPU, dtype=torch.float32)
    assert attention.can_run("flash-attn", replace(problem, autocast=torch.float16)).ok
    assert attention.can_run("xformers", problem).ok


@pytest.mark.parametrize("name", ["sdpa", "math", *PACKAGES])
def test_every_kernel_gets_its_layout(name: str, packages: list[str]) -> None:
    qkv = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    exact = (torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1) @ v).transpose(1, 2)
    torch.testing.assert_close(attention.attend(name, qkv), exact, rtol=1e-10, atol=1e-12)
    assert packages == [name] * (name in PACKAGES)


def test_explain_names_every_kernel_and_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    text = attention.explain(GPU)
    assert all(name in text for name in attention.ATTENTIONS)
    assert "'auto' runs: sdpa, which dispatches itself: cudnn attention on H100, H200 and B200, flash attention" in text
    assert "pip install xformers" in text
    assert "cannot run" in attention.explain(replace(GPU, attention="xformers"))


def test_explain_says_what_pytorch_answers_where_it_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what holds on another machine, and not flash attention for float32, which that kernel does not take."""
    said = attention.explain(CPU).splitlines()[-1]
    q = torch.empty(1, CPU.num_heads, CPU.tokens, CPU.head_dim)
    name = SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace("_", " ")
    assert said.endswith(f"itself: {name}, as PyTorch {torch.__version__} answers for these sizes on cpu")
    wide = replace(GPU, dtype=torch.float32)
    assert "efficient attention for float32" in attention.explain(wide)
    assert "dispatches itself" in attention.explain(replace(GPU, attention="sdpa"))
    made: list[tuple[torch.device, torch.dtype, tuple[int, ...]]] = []
    true = torch.empty

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append((device, dtype, shape))
        return true(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: int(SDPBackend.CUDNN_ATTENTION))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = attention.explain(replace(wide, autocast=torch.bfloat16, gpu=1))
    assert made == [(torch.device("cuda", 1), torch.bfloat16, (1, 197, 12, 64))] * 3
    assert f"cudnn attention, as PyTorch {torch.__version__} answers for these sizes on cuda:1" in text
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert "by the source of PyTorch 2.14" in attention.explain(GPU)


def test_no_backend_replaces_what_was_asked_for() -> None:
    asked = replace(CPU, attention="flash-attn")
    for name in backends.BACKENDS:
        assert not backends.can_run(name, asked).ok
    with pytest.raises(cast_kernels.BackendError, match=r"no backend can.*native core attends itself.*runs on cuda"):
        backends.select("auto", asked)
    assert backends.select("auto", replace(CPU, attention="sdpa")) == "eager"
    with pytest.raises(cast_kernels.BackendError, match="native core attends itself"):
        backends.select("cpu", replace(CPU, attention="sdpa"))


def test_the_op_takes_it() -> None:
    case = Case()
    x, parameters = case.x(), case.parameters()
    options = {"num_heads": case.heads, "eps": 1e-5}
    asked = cast_kernels.self_attention(x, parameters, attention="sdpa", **options)  # type: ignore[arg-type]
    exact = run(case, torch.float64, None)["y"]
    torch.testing.assert_close(asked.double(), exact, atol=1e-5, rtol=1e-5)
    with pytest.raises(cast_kernels.BackendError, match="flash-attn runs on cuda"):
        cast_kernels.self_attention(x, parameters, attention="flash-attn", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'flash'; allowed: 'auto', 'sdpa', 'math', 'flash-attn', 'xformers'"):
        cast_kernels.self_attention(x, parameters, attention="flash", **options)  # type: ignore[arg-type]


SIZES = {"variant": "tiny", "depth": 1, "num_frames": 4, "image_size": 16}


def test_the_model_hands_it_to_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    true = attention.attend
    monkeypatch.setattr(attention, "attend", lambda name, qkv: seen.append(name) or true(name, qkv))
    video = torch.randn(1, 3, 4, 16, 16)
    CAST(**SIZES, attention="sdpa")(video)  # type: ignore[arg-type]
    assert seen == ["sdpa"] * 2
    with pytest.raises(cast_kernels.BackendError, match="xformers runs on cuda"):
        CAST(**SIZES, attention="xformers")(video)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention is 'fast'"):
        CAST(**SIZES, attention="fast")  # type: ignore[arg-type]


def test_only_an_import_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that breaks while it is imported is not the same as one that is missing."""

    def broken(name: str) -> SimpleNamespace:
        raise ZeroDivisionError(name)

    monkeypatch.setattr(attention.importlib, "import_module", broken)
    with pytest.raises(ZeroDivisionError):
        attention.can_run("flash-attn", GPU)
