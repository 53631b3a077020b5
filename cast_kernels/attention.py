"""Chooses the attention of the experts' self-attention and of the exchange, and says why. No other module decides this.

"auto" is PyTorch's `scaled_dot_product_attention` on every device, which is a dispatcher itself. On a GPU, for 16-bit
operands without a mask, PyTorch 2.14 runs cuDNN's kernel on compute capability 9.0, 10.0 and 10.3 (H100, H200, B200)
with a cuDNN newer than 9.15.0, unless TORCH_CUDNN_SDPA_DEPRIORITIZED=1 is set. On other GPUs it runs the
flash-attention kernel that it ships, the same algorithm as the package flash-attn 2 (its source: `priority_order` in
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). A package runs only if the caller names it, because its speed
depends on release and GPU. "math" is two matrix products and a softmax, with scores in memory: it has second and
forward-mode derivatives.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from cast_kernels.compiling import constant
from cast_kernels.problem import BackendError, SelfAttentionProblem, Verdict

#: Names besides "auto" -> the package that each needs, or None.
ATTENTIONS: dict[str, str | None] = {
    "sdpa": None,
    "math": None,
    "flash-attn": "flash_attn",
    "xformers": "xformers.ops",
}

#: Kernels that read queries, keys and values from one tensor and return one gradient.
PACKED = ("flash-attn",)
#: Layouts of queries, keys and values: one tensor [batch, tokens, 3, heads, head_dim]; three [batch, heads, tokens,
#: head_dim]; three [batch, tokens, heads, head_dim].
PACKED_HEADS, HEADS_FIRST, TOKENS_FIRST = "packed", "heads first", "tokens first"

#: Names that the exchange takes; its kernels contain their attention.
EXCHANGE_ATTENTIONS = ("auto", "math")

#: Widest head that both packages take.
_MOST_CHANNELS = 256


def check_name(attention: str) -> str:
    """Return the name, or raise ValueError naming the allowed ones."""
    if attention != "auto" and attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; allowed: 'auto', {', '.join(map(repr, ATTENTIONS))}")
    return attention


def check_exchange_name(attention: str) -> str:
    """The same for the exchange."""
    if attention not in EXCHANGE_ATTENTIONS:
        allowed = ", ".join(map(repr, EXCHANGE_ATTENTIONS))
        raise ValueError(f"attention is {attention!r}; B-CAST takes {allowed}")
    return attention


def of_exchange(attention: str) -> str:
    """The exchange's attention beside experts with `attention`: packages attend only in experts."""
    return "math" if check_name(attention) == "math" else "auto"


def can_run(attention: str, problem: SelfAttentionProblem) -> Verdict:
    """Whether one attention kernel can run the problem, and why or why not.

    Raises:
        ValueError: no such kernel; "auto" is a choice among them.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; ask for one of {', '.join(map(repr, ATTENTIONS))}")
    package = ATTENTIONS[attention]
    if attention == "math":
        return Verdict(True, "products and a softmax: slower, with second and forward-mode derivatives")
    if package is None:
        return Verdict(True, "PyTorch's own, which picks among the kernels that it ships")
    if problem.device != "cuda":
        return Verdict(False, f"the stream is on {problem.device}; {attention} runs on cuda")
    allowed = [torch.float16, torch.bfloat16] + ([torch.float32] if attention == "xformers" else [])
    if problem.compute not in allowed:
        return Verdict(
            False, f"the compute dtype is {problem.compute}; {attention} takes {', '.join(map(str, allowed))}"
        )
    if problem.head_dim % 8 or problem.head_dim > _MOST_CHANNELS:
        return Verdict(False, f"heads have {problem.head_dim} channels; a multiple of 8 up to {_MOST_CHANNELS} fits")
    missing = _import_error(package)
    if missing:
        return Verdict(False, f"{package} cannot be imported: {missing}; pip install {attention}")
    return Verdict(True, f"{package} is installed")


@constant
def _import_error(package: str) -> str:
    """Why the package cannot be imported, "" if it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return ""


def requested(problem: SelfAttentionProblem) -> Verdict:
    """The verdict on the attention that the problem names. Backends that use these kernels return it."""
    verdict = can_run("sdpa" if problem.attention == "auto" else problem.attention, problem)
    return verdict if verdict.ok else Verdict(False, f"attention={problem.attention!r}: {verdict.reason}")


def select(problem: SelfAttentionProblem) -> str:
    """The attention kernel that runs the problem: the named one, never another in its place.

    Raises:
        ValueError: the problem names a kernel that does not exist.
        BackendError: the named kernel cannot run; the message says why and what to do.
    """
    if check_name(problem.attention) == "auto":
        return "sdpa"
    verdict = can_run(problem.attention, problem)
    if not verdict.ok:
        raise BackendError(
            f"attention={problem.attention!r} cannot run this problem: {verdict.reason}. Use attention='auto' for "
            "PyTorch's own, or cast_kernels.attention.explain(...) to see all of them."
        )
    return problem.attention


def explain(problem: SelfAttentionProblem) -> str:
    """Every attention kernel with yes or no and its reason, and which one the problem gets, as text."""
    lines = [str(problem)]
    for name in ATTENTIONS:
        verdict = can_run(name, problem)
        lines.append(f"  {name:<10} {'yes' if verdict.ok else 'no '}  {verdict.reason}")
    try:
        chosen = select(problem)
        why = f", which dispatches itself: {dispatched(problem)}" if chosen == "sdpa" else ""
        lines.append(f"attention={problem.attention!r} runs: {chosen}{why}")
    except BackendError as error:
        lines.append(str(error))
    return "\n".join(lines)


def dispatched(problem: SelfAttentionProblem) -> str:
    """The kernel that PyTorch's `scaled_dot_product_attention` takes, in words, and how that is known.

    Where the problem's device exists, PyTorch answers; elsewhere the answer is from the source of PyTorch 2.14.
    """
    here = problem.device == "cpu" or (problem.device == "cuda" and torch.cuda.is_available())
    ask = getattr(torch, "_fused_sdp_choice", None)  # no public function tells
    if here and ask is not None:
        device = torch.device(problem.device if problem.gpu is None else f"{problem.device}:{problem.gpu}")
        shape = (1, problem.tokens, problem.num_heads, problem.head_dim)
        q, k, v = (torch.empty(shape, dtype=problem.compute, device=device).transpose(1, 2) for _ in range(3))
        name = SDPBackend(ask(q, k, v)).name.lower().replace("_", " ")
        return f"{name}, as PyTorch {torch.__version__} answers for these sizes on {device}"
    if problem.device == "cpu":
        return "its kernel for CPUs"
    if problem.compute == torch.float32:
        return "efficient attention for float32, by the source of PyTorch 2.14"
    return "cudnn attention on H100, H200 and B200, flash attention on other GPUs, by the source of PyTorch 2.14"


def attend(name: str, qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the tokens.

    Args:
        name: a key of :data:`ATTENTIONS`.
        qkv: [batch, tokens, 3, heads, head_dim], as one projection leaves it: no kernel here needs a copy.

    Returns:
        [batch, tokens, heads, head_dim].
    """
    if name == "flash-attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(qkv)
    return attend_apart(name, *qkv.unbind(2))


def attend_apart(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same from three tensors [batch, tokens, heads, head_dim], for a `name` that is not in :data:`PACKED`."""
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    return mix(name, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def layout(name: str) -> str:
    """How the kernel takes queries, keys and values. It returns likewise; a packed one returns tokens first."""
    if name in PACKED:
        return PACKED_HEADS
    return TOKENS_FIRST if name == "xformers" else HEADS_FIRST


def attend_as(name: str, layout: str, heads: Sequence[Tensor]) -> Tensor:
    """The same for heads in the kernel's own layout."""
    if layout == PACKED_HEADS:
        return attend(name, heads[0])
    return mix(name, *heads) if layout == HEADS_FIRST else attend_apart(name, *heads)


def mix(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in PyTorch's operators: "math" spelled out, any other name by its dispatcher.

    Args:
        name: of the attention.
        q, k, v: [..., tokens, head_dim].
    """
    if name != "math":
        return F.scaled_dot_product_attention(q, k, v)
    # Scores of 16-bit operands stay float32, as in the kernels. PyTorch's own switch to its "math" is for the whole
    # process, so it would reach other threads.
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * q.shape[-1] ** -0.5
        return (torch.softmax(scores, -1) @ v.to(wide)).to(v.dtype)
