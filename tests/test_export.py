"""Exported programs answer as the model does, for any batch, or are not written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cast_models import SMALL, randomise
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor
from torch.export.passes import move_to_device_pass

import cast
from cast import export as module
from cast.cli import main
from cast.export import ParityError, export
from cast.ground.optional import MissingExtraError
from cast_kernels import BackendError

NAMES = {"verb": ["open", "close", "cut"], "noun": ["door", "tap", "onion", "drawer"]}
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="the extra onnx is missing"
)


@pytest.fixture(scope="module")
def model() -> cast.CAST:
    torch.manual_seed(0)
    found = randomise(cast.CAST(heads={"verb": 3, "noun": 4}, **(SMALL | {"depth": 1})))
    found.labels, found.sampling = NAMES, "dense"
    return found.eval()


def clips(count: int) -> Tensor:
    return torch.randn(count, 3, 6, 16, 16, generator=torch.Generator().manual_seed(1))


def test_torch_export_answers_as_the_model(model: cast.CAST, tmp_path: Path) -> None:
    done = export(model, tmp_path / "m.pt2")
    assert done.files == list(tmp_path.iterdir()) == [tmp_path / "m.pt2"]
    assert done.error < 1e-4
    about: dict[str, object] = {"labels.json": "", "config.json": "", "input.json": ""}
    program = torch.export.load(done.files[0], extra_files=about).module()
    for batch in (1, 5):
        noun, verb = program(clips(batch))
        wanted = model(clips(batch))
        assert torch.allclose(noun, wanted["noun"], atol=1e-4)
        assert torch.allclose(verb, wanted["verb"], atol=1e-4)
    assert json.loads(about["labels.json"]) == NAMES
    assert json.loads(about["config.json"])["depth"] == 1
    assert json.loads(about["input.json"])["sampling"] == "dense"


def test_layers_that_were_wrapped_are_exported_as_they_are(model: cast.CAST, tmp_path: Path) -> None:
    hooked = copy.deepcopy(model)
    hooked.blocks[0].get_submodule("attn.qkv").register_forward_hook(lambda _, args, output: 2 * output)
    export(hooked, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    verb = hooked.unfuse()(clips(2))["verb"]
    assert torch.allclose(program(clips(2))[1], verb, atol=1e-4)
    assert not torch.allclose(model(clips(2))["verb"], verb, atol=1e-2)


@pytest.mark.slow
@needs_onnx
def test_onnx_answers_as_the_model(model: cast.CAST, tmp_path: Path) -> None:
    import onnxruntime

    done = export(model, tmp_path / "m.onnx", "onnx")
    assert done.files == list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]
    session = onnxruntime.InferenceSession(done.files[0], providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["noun", "verb"]
    wanted = model(clips(5))
    for name, array in zip(("noun", "verb"), session.run(["noun", "verb"], {"video": clips(5).numpy()}), strict=True):
        assert torch.allclose(torch.from_numpy(array), wanted[name], atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels.json"]) == NAMES


def test_a_program_that_answers_otherwise_is_not_written(
    model: cast.CAST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pt2").write_text("an earlier one")

    def write(traced: object, path: Path, heads: list[str], about: dict[str, str]) -> None:
        path.write_text("a wrong one")

    def wrong(path: Path, heads: list[str]) -> Callable[[Tensor], Sequence[Tensor]]:
        assert path.read_text() == "a wrong one"
        return lambda video: [model(video)[head] + 0.1 * (len(video) > 1) for head in heads]

    monkeypatch.setitem(module._FORMATS, "torch", (write, wrong))
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    with pytest.raises(ParityError, match=r"differ by .* of the largest one at batch 3; allowed is 0\.001"):
        export(model, tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "an earlier one"


def test_logits_that_are_no_numbers_fail_the_comparison(model: cast.CAST) -> None:
    program = module._Heads(model)
    with pytest.raises(ParityError, match="differ by nan"):
        module.parity(program, lambda video: [logits * float("nan") for logits in program(video)])
    with pytest.raises(ParityError, match="head 0 has shape"):
        module.parity(program, lambda video: [logits[:, :1] for logits in program(video)])


def test_the_command_says_what_it_wrote(
    model: cast.CAST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)

    def quick(traced: object, path: Path, heads: list[str], about: dict[str, str]) -> None:
        path.write_bytes(bytes(300_000))

    def run(path: Path, heads: list[str]) -> Callable[[Tensor], Sequence[Tensor]]:
        return lambda video: [model(video)[head] for head in heads]

    monkeypatch.setitem(module._FORMATS, "torch", (quick, run))
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    assert main(["export", "mine"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "mine.pt2  0.3 MB"
    assert "largest difference from the model" in second
    monkeypatch.chdir(tmp_path / "mine")
    assert main(["export", "."]) == 0
    assert capsys.readouterr().out.startswith("mine.pt2 ")
    assert main(["export", "none"]) == 1
    assert "none: no such directory" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_first(model: cast.CAST, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="format is 'tflite'; it must be 'torch' or 'onnx' or 'torch-cuda'"):
        export(model, tmp_path / "m", "tflite")
    for bad in (tmp_path, tmp_path / "none" / "m.pt2"):
        with pytest.raises(ValueError, match="give a file in a directory that is there"):
            export(model, bad)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    from cast.ground import optional

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"'onnx' is not installed; run: pip install 'cast-kernels\[onnx\]'"):
        export(model, tmp_path / "m.onnx", "onnx")


def test_the_fused_program_for_a_gpu_is_made_without_one_and_answers_in_emulation(tmp_path: Path) -> None:
    """The program is moved to the CPU, where the emulated device runs the kernels that it launches."""
    torch.manual_seed(0)
    given = randomise(
        cast.CAST(
            heads={"verb": 16, "noun": 16}, image_size=16, patch_size=8, num_frames=4, embed_dim=64, depth=1,
            num_heads=2, mlp_ratio=1.0,
        )
    ).eval()  # fmt: skip
    done = export(given, tmp_path / "m.pt2", "torch-cuda", precision="bfloat16")
    assert done.error is None
    loaded = torch.export.load(done.files[0])
    names = {str(node.target) for node in loaded.graph.nodes}
    assert {f"cast_kernels.{op}.default" for op in ("adapter", "bcast", "ffn")} <= names
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.bfloat16}
    weight = loaded.state_dict["model.head_verb.weight"]
    assert torch.equal(weight, given.head_verb.weight.bfloat16())
    program = move_to_device_pass(loaded, "cpu").module()
    video = torch.randn(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = copy.deepcopy(given).double().unfuse()(video.double())
        eager = copy.deepcopy(given).bfloat16().unfuse()(video.bfloat16())
        with offline_driver(target("sm_90"), Emulator()) as emulator:
            noun, verb = program(video)
    assert emulator.runs.keys() >= {"adapter_forward", "exchange", "project"}
    for head, found in (("noun", noun), ("verb", verb)):
        assert found.dtype == torch.float32
        allowed = 2 * (eager[head].double() - exact[head]).norm()
        assert (found.double() - exact[head]).norm() <= allowed


def test_what_no_kernel_can_run_is_not_exported_for_a_gpu(tmp_path: Path, model: cast.CAST) -> None:
    with pytest.raises(BackendError, match="triton"):
        export(model, tmp_path / "m.pt2", "torch-cuda")
    with pytest.raises(ValueError, match="precision is 'bfloat16'; it must be float32, or with format 'torch-cuda'"):
        export(model, tmp_path / "m.pt2", "torch", precision="bfloat16")
    assert not list(tmp_path.iterdir())
