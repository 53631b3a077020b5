"""Inference engines to which a user would export the model, for comparison with PyTorch.

Every engine has its own thread pool. Its idle threads must not take cores from the next sample. So ONNX Runtime's
threads do not spin: by default they kept 0.06 to 0.08 of a core busy in the half second after a call. And OpenVINO's
threads are not pinned: by default a worker stayed bound to one core between calls.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Unavailable
from torch import Tensor

import cast

Infer = Callable[[], dict[str, Tensor]]


def need(*packages: str) -> list[Any]:
    """The packages, imported.

    Raises:
        Unavailable: one of them is not installed.
    """
    found = []
    for name in packages:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            raise Unavailable(f"not installed ({error}); to add the row: pip install -e '.[bench]'") from None
    return found


def openvino(model: cast.CAST, video: Tensor, threads: int) -> Infer:
    """The model in OpenVINO, one stream, tuned for latency, in fp32 (by default it may choose bf16)."""
    (ov,) = need("openvino")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns at every check of shapes
        converted = ov.convert_model(model, example_input=video, input=[list(video.shape)])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = ov.Core().compile_model(converted, "CPU", options)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    assert "32" in str(precision), f"OpenVINO runs in {precision}, not in the f32 asked for"
    names, array = list(model.config.classes), video.numpy()

    def run() -> dict[str, Tensor]:
        result = compiled(array)
        return {name: torch.from_numpy(result[name]) for name in names}

    return run


def onnx_runtime(model: cast.CAST, video: Tensor, threads: int) -> Infer:
    """The model in ONNX Runtime's CPU provider, fp32, all graph optimisations."""
    runtime, *_ = need("onnxruntime", "onnx", "onnxscript")
    with torch.no_grad():
        names = list(model(video))
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "model.onnx")
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                model, (video,), path, dynamo=True, input_names=["video"], output_names=names, external_data=True
            )
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"video": video.numpy()}

    def run() -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))

    return run
