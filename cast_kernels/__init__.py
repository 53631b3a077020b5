"""Fused kernels for two-stream video transformers: B-CAST forward and backward, one op over all backends."""

# torch comes first: the native core then binds to the OpenMP runtime that torch has loaded, one thread pool for both.
import torch  # noqa: F401

import cast_kernels.versions  # noqa: F401  before all that would fail with an older torch
from cast_kernels import attention, backends, plain, reference
from cast_kernels.backends import BackendError
from cast_kernels.modules.bcast import BCAST, explain
from cast_kernels.modules.cross_attention import CrossAttention
from cast_kernels.ops.adapter import adapter
from cast_kernels.ops.bcast import bcast
from cast_kernels.ops.ffn import ffn
from cast_kernels.ops.self_attention import self_attention
from cast_kernels.problem import (
    ACTIVATIONS,
    DIRECTIONS,
    WINDOWS,
    AdapterParameters,
    AdapterProblem,
    Direction,
    FFNParameters,
    FFNProblem,
    Parameters,
    Problem,
    Recompute,
    SelfAttentionParameters,
    SelfAttentionProblem,
    Stream,
)

#: Of the package, as installed.
__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "BCAST",
    "DIRECTIONS",
    "WINDOWS",
    "AdapterParameters",
    "AdapterProblem",
    "BackendError",
    "CrossAttention",
    "Direction",
    "FFNParameters",
    "FFNProblem",
    "Parameters",
    "Problem",
    "Recompute",
    "SelfAttentionParameters",
    "SelfAttentionProblem",
    "Stream",
    "__version__",
    "adapter",
    "attention",
    "backends",
    "bcast",
    "explain",
    "ffn",
    "plain",
    "reference",
    "self_attention",
]
