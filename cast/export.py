"""`cast export`: the eager model as a program without this package, for PyTorch or ONNX, or the fused one for GPUs.

The program takes `video`, float32 [batch, 3, frames, H, W], normalised like the model's input, with any batch. It
returns the logits of each head in the heads' alphabetical order. It is compared with the model before its file is
written.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.passes import move_to_device_pass

from cast.ground.optional import require
from cast.ground.sampling import as_json
from cast.model import CAST
from cast.model.config import CASTConfig
from cast.model.labels import numbers
from cast.model.zoo import load
from cast.video.transforms import MEAN, STD

Format = Literal["torch", "onnx", "torch-cuda"]
ENDINGS = {"torch": ".pt2", "onnx": ".onnx", "torch-cuda": ".pt2"}
Precision = Literal["float32", "bfloat16", "float16"]

#: Largest allowed difference of a logit over the largest logit. fp32 sums in another order, 12 blocks deep, cause less
#: than 1e-5 on the small test models (measured). A lost bias or a swapped axis causes more than 1e-1.
TOLERANCE = 1e-3
#: Batches for the comparison; neither is the traced one.
BATCHES = (1, 3)
#: Largest ONNX file in one piece. The format ends at 2 GiB; larger weights go into a file beside it.
_ONE_FILE = 1_900_000_000


class ParityError(ValueError):
    """The exported program's answers differ from the model's; no file was written."""


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        files: the written files; load the first one.
        error: largest difference from the model's logits over the largest logit; None if it was not compared, because
            the program needs a GPU and there is none.
    """

    files: list[Path]
    error: float | None


class _Heads(nn.Module):
    """The model with a tuple of float32 logits, which every format supports. It computes in its weights' dtype."""

    model: CAST
    config: CASTConfig

    def __init__(self, model: CAST) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.heads: list[str] = sorted(model.config.classes)
        self.dtype: torch.dtype = model.clip_class_embedding.dtype

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(video if self.dtype == torch.float32 else video.to(self.dtype))
        return tuple(logits[head].float() for head in self.heads)


def export(
    model: CAST | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    format: Format = "torch",
    trust_pickle: bool = False,
    precision: Precision = "float32",
) -> Exported:
    """Write a model as a program.

    Args:
        model: a CAST, whose weights are taken in fp32; or its place, see `cast.model.zoo.load`.
        path: the file; if None the model's directory's name with `.pt2` or `.onnx`, in the working directory.
        format: "torch" (`torch.export`, loads with `torch.export.load`), "onnx" (loads with ONNX Runtime), or
            "torch-cuda" (`torch.export` with this package's kernels, for a GPU, made with or without one).
        trust_pickle: whether a torch file may run code while it loads.
        precision: of weights and products; others than float32 for "torch-cuda" only.

    Raises:
        ValueError: no such format or precision, or a path that is a directory.
        BackendError: the kernels cannot run the model on a GPU; the message says why.
        ParityError: the program's answers differ from the model's.
        MissingExtraError: ONNX's packages are not installed.
        FileNotFoundError: no such model.
    """
    if format not in ENDINGS:
        raise ValueError(f"format is {format!r}; it must be {' or '.join(map(repr, ENDINGS))}")
    if precision not in get_args(Precision) or (precision != "float32" and format != "torch-cuda"):
        raise ValueError(
            f"precision is {precision!r}; it must be float32, or with format 'torch-cuda' bfloat16 or float16"
        )
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx")
    name = "cast" if isinstance(model, CAST) else Path(model).resolve().name
    target = Path(path or f"{name}{ENDINGS[format]}")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target}: give a file in a directory that is there")
    given = model if isinstance(model, CAST) else load(model, trust_pickle=trust_pickle)
    on_gpu = format == "torch-cuda"
    program = _Heads(_fused(given, precision) if on_gpu else _eager(given)).eval()
    traced = _trace_for_gpu(program) if on_gpu else _trace(program, torch.randn(_shape(given.config, 2)))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        draft = Path(folder) / target.name
        _FORMATS[format][0](traced, draft, program.heads, _about(given))
        error = None
        if not on_gpu or torch.cuda.is_available():
            error = parity(_where_it_runs(program, on_gpu), _FORMATS[format][1](draft, program.heads))
        files = [target, *(target.parent / extra.name for extra in sorted(Path(folder).iterdir()) if extra != draft)]
        for file in reversed(files):  # the file to load comes last, after all that it needs
            shutil.move(Path(folder) / file.name, file)
    return Exported(files, error)


def parity(program: _Heads, other: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """Compare a program with the model on random clips, in batches of one and of three.

    Args:
        program: the model, from clips to a tuple of logits.
        other: the same from the exported file.

    Returns:
        The largest difference, over the largest logit.

    Raises:
        ParityError: the difference is above the tolerance, or NaN.
    """
    config, where = program.config, program.model.clip_class_embedding.device
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        video = torch.randn(_shape(config, batch), generator=generator)
        with torch.inference_mode():
            ours, theirs = (run(video.to(where)) for run in (program, other))
        for head, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.shape != b.shape:
                raise ParityError(f"head {head} has shape {list(b.shape)} in the export, {list(a.shape)} in the model")
            scale = max(float(a.abs().max()), torch.finfo(torch.float32).tiny)
            error = float((a - b).abs().max()) / scale
            if not error <= TOLERANCE:  # fails for NaN
                raise ParityError(
                    f"the export's logits differ by {error:.2g} of the largest one at batch {batch}; allowed is "
                    f"{TOLERANCE:g}, so nothing was written"
                )
            worst = max(worst, error)
    return worst


def _eager(model: CAST) -> CAST:
    """An fp32 copy on the CPU that runs eagerly, so that compilers see every op; wrapped layers stay wrapped."""
    return copy.deepcopy(model).float().cpu().unfuse().requires_grad_(False).eval()


def _fused(model: CAST, precision: Precision) -> CAST:
    """A copy on the CPU whose ops run in the kernels for GPUs, or raise with the reason."""
    own = copy.deepcopy(model).to("cpu", getattr(torch, precision))
    return own.fuse("triton").requires_grad_(False).eval()


def _shape(config: CASTConfig, batch: int) -> tuple[int, ...]:
    return batch, 3, config.num_frames, config.image_size, config.image_size


def _trace(program: _Heads, video: Tensor) -> Any:
    return torch.export.export(program, (video,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _trace_for_gpu(program: _Heads) -> Any:
    """The program for a GPU, traced with tensors that have only shapes; its weights are the model's, on the CPU.

    Raises:
        ValueError: the model makes a tensor in its forward pass and keeps it, so that the tensor has no value here.
    """
    twin = copy.deepcopy(program).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = twin.to_empty(device="cuda")
        traced = _trace(twin, torch.empty(_shape(program.config, 2), device="cuda"))
    own = dict(program.named_parameters()) | dict(program.named_buffers())
    unknown = sorted((traced.state_dict.keys() | traced.constants.keys()) - own.keys())
    if unknown:
        raise ValueError(f"the model makes {', '.join(unknown)} in its forward pass: give it as a buffer")
    traced._state_dict = {name: own[name] for name in traced.state_dict}
    traced._constants = {name: own[name] for name in traced.constants}
    traced._example_inputs = ((torch.zeros(_shape(program.config, 2)),), {})
    return traced


def _where_it_runs(program: _Heads, on_gpu: bool) -> _Heads:
    return program.to("cuda") if on_gpu else program


def _about(model: CAST) -> dict[str, str]:
    """Information for users of the file, as text."""
    config = model.config
    sampling = as_json(model.sampling, model.short_side) or {}
    return {
        "config.json": json.dumps(config.to_dict()),
        "labels.json": json.dumps(model.labels or numbers(config.classes), ensure_ascii=False),
        "input.json": json.dumps(
            {"layout": "batch, RGB, frames, height, width", "range": [0, 1], "mean": list(MEAN), "std": list(STD)}
            | sampling
        ),
    }


def _write_torch(traced: Any, path: Path, heads: list[str], about: dict[str, str]) -> None:
    torch.export.save(traced, path, extra_files=about)


def _run_torch(path: Path, heads: list[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    return torch.export.load(path).module()


def _run_on_gpu(path: Path, heads: list[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    return move_to_device_pass(torch.export.load(path), "cuda").module()


def _write_onnx(traced: Any, path: Path, heads: list[str], about: dict[str, str]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in traced.state_dict.values())
    program = torch.onnx.export(
        traced, input_names=["video"], output_names=heads, external_data=False, dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=size > _ONE_FILE)


def _run_onnx(path: Path, heads: list[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    runtime = require("onnxruntime", "onnx")
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def run(video: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(array) for array in session.run(heads, {"video": video.numpy()})]

    return run


_Writer = Callable[[Any, Path, list[str], dict[str, str]], None]
_Runner = Callable[[Path, list[str]], Callable[[Tensor], Sequence[Tensor]]]
_FORMATS: dict[str, tuple[_Writer, _Runner]] = {
    "torch": (_write_torch, _run_torch),
    "onnx": (_write_onnx, _run_onnx),
    "torch-cuda": (_write_torch, _run_on_gpu),
}


def main(
    checkpoint: str,
    format: Format,
    out: Path | None,
    trust_pickle: bool = False,
    precision: Precision = "float32",
) -> None:
    """Export, and print the written files and the difference."""
    done = export(checkpoint, out, format, trust_pickle, precision)
    for file in done.files:
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    if done.error is None:
        print("not compared with the model: the program runs on a GPU, and there is none")
        return
    print(f"largest difference from the model: {done.error:.1e} of the largest logit, in batches of 1 and 3")
