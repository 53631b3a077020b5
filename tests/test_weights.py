"""Checkpoints: every container, nothing executed, every misfit listed, the same model back."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import GOLDEN, SMALL, open_clip_model, randomise, read_golden, small_model, small_video, under
from safetensors.torch import save_file
from torch import Tensor

import cast
from cast.model.weights.official import infer_config
from cast.model.weights.torchscript import read_torchscript

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_golden("cast_compositional_tiny")[1]


# -- published CAST checkpoints


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("fused", [True, False])
def test_official_checkpoint_works(name: str, fused: bool) -> None:
    tensors = read_golden(name)[1]
    model = cast.load_official_checkpoint(under(tensors, "weight."), num_heads=4, fused=fused)
    assert not model.training
    assert {block.backend for block in model.blocks} == {"auto" if fused else "eager"}
    for head, logits in model(tensors["input"]).items():
        expected = tensors[f"logits.{head}"]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(p.requires_grad for p in model.parameters()) == len(under(tensors, "grad."))


CONTAINERS = {
    "plain": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 49, "args": argparse.Namespace(lr=1e-3)},
    "module": lambda weights: {"module": weights, "global_steps": 7},
    "prefixes": lambda weights: {"module": {f"module.backbone.{key}": value for key, value in weights.items()}},
    "encoder": lambda weights: {f"encoder.{key}": value for key, value in weights.items()},
    "half": lambda weights: {"module": {key: value.half() for key, value in weights.items()}},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_official_containers(golden: Weights, container: str, tmp_path: Path) -> None:
    weights = under(golden, "weight.")
    checkpoint = CONTAINERS[container](weights)
    torch.save(checkpoint, tmp_path / "mp_rank_00_model_states.pt")
    for source in (checkpoint, str(tmp_path / "mp_rank_00_model_states.pt"), tmp_path):
        model = cast.load_official_checkpoint(source, num_heads=4)
        state = model.state_dict()
        assert state.keys() == weights.keys()
        assert {value.dtype for value in state.values()} == {torch.float32}
        tolerance = 1e-3 if container == "half" else 0
        assert all(torch.allclose(state[key], weights[key], rtol=tolerance, atol=tolerance) for key in weights)


def test_official_safetensors(golden: Weights, tmp_path: Path) -> None:
    weights = under(golden, "weight.")
    save_file(weights, tmp_path / "cast.safetensors")
    state = cast.load_official_checkpoint(tmp_path / "cast.safetensors", num_heads=4).state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_loaded_model_does_not_share_the_caller_s_tensors(golden: Weights) -> None:
    weights = under(golden, "weight.")
    model = cast.load_official_checkpoint(weights, num_heads=4)
    before = weights["head_noun.weight"].clone()
    with torch.no_grad():
        model.head_noun.weight.zero_()
    assert torch.equal(weights["head_noun.weight"], before)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"windows": ("space-time", "space-time")},
        {"windows": ("space-time", "space")},
        {"windows": ("time", "time"), "num_frames": 8},
        {"windows": ("space", "space"), "num_frames": 16},
        {"directions": ("t2s",)},
        {"directions": ("s2t",), "num_frames": 16},
        {"directions": (), "num_frames": 16},
        {"exchange_layers": (1,)},
        {"positions": False, "num_frames": 16},
        {"down_ratio": 4, "adapter_ratio": 3 / 16, "mlp_ratio": 7 / 16, "heads": {"verb": 4, "noun": 2}},
        {"tubelet_size": 3, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3, "down_ratio": 48 / 21},
    ],
    ids=str,
)
def test_sizes_are_inferred_from_shapes(change: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = cast.CAST(**(SMALL | change))
    assert infer_config(model.state_dict(), num_heads=model.config.num_heads) == model.config


@pytest.mark.parametrize("heads", [{"verb": 97, "noun": 300}, {"action": 400}, {"action": 174}], ids=str)
def test_published_sizes_are_inferred_without_help(heads: dict[str, int]) -> None:
    with torch.device("meta"):
        model = cast.CAST(heads=heads)
    assert infer_config(model.state_dict()) == cast.CASTConfig(heads=heads)


def test_official_misfits_are_listed(golden: Weights) -> None:
    weights = under(golden, "weight.")
    with pytest.raises(ValueError, match="num_heads cannot be read from shapes, and 32 is no multiple of 64"):
        cast.load_official_checkpoint(weights)
    broken = weights | {"fusion.weight": torch.zeros(1), "clip_ln_pre.bias": torch.zeros(7)}
    del broken["blocks.1.norm2.weight"], broken["blocks.0.S_Adapter.D_fc2.bias"]
    with pytest.raises(ValueError, match="does not fit") as error:
        cast.load_official_checkpoint(broken, num_heads=4)
    message = str(error.value)
    assert "missing keys: blocks.0.S_Adapter.D_fc2.bias, blocks.1.norm2.weight" in message
    assert "unknown keys: fusion.weight" in message
    assert "clip_ln_pre.bias is [7], the model has [32]" in message
    with pytest.raises(ValueError, match="no CAST checkpoint in the official layout: clip_positional_embedding"):
        cast.load_official_checkpoint({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="num_heads is 0"):
        infer_config(weights, num_heads=0)
    with pytest.raises(ValueError, match="no head in the checkpoint"):
        infer_config({key: value for key, value in weights.items() if "head" not in key}, num_heads=4)


# -- experts


def test_published_experts_fill_309_tensors() -> None:
    """158 from VideoMAE, 151 from CLIP; 534 stay as they were."""
    size = SMALL | {"depth": 12, "heads": {"verb": 97, "noun": 300}}
    model = randomise(cast.CAST(**size))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clip, videomae = cast.SpatialExpert(**(SMALL | {"depth": 12})), cast.TemporalExpert(**(SMALL | {"depth": 12}))

    def changed() -> int:
        return sum(not torch.equal(value, before[key]) for key, value in model.state_dict().items())

    randomise(clip, seed=1)
    model.load_experts(clip=clip)
    assert changed() == 151
    model.load_experts(videomae=randomise(videomae, seed=2))
    assert changed() == 151 + 158
    assert len(before) - changed() == 534


def test_expert_misfits_are_listed() -> None:
    clip = cast.SpatialExpert(**SMALL).state_dict()
    clip["ln_mid.weight"] = clip.pop("ln_pre.weight")
    with pytest.raises(ValueError, match=r"missing keys: ln_pre.weight; unknown keys: ln_mid.weight$"):
        cast.CAST(**SMALL).load_experts(clip=clip)
    deeper = cast.TemporalExpert(**(SMALL | {"depth": 3, "image_size": 24, "patch_size": 12})).state_dict()
    with pytest.raises(ValueError, match=r"unknown keys: blocks.2.norm1.weight, .*other shapes: patch_embed.proj.wei"):
        cast.CAST(**SMALL).load_experts(videomae=deeper)
    incomplete = open_clip_model().state_dict() | {"audio.proj": torch.zeros(1)}
    del incomplete["visual.transformer.resblocks.1.attn.in_proj_bias"]
    with pytest.raises(ValueError, match=r"missing keys: .*resblocks.1.attn.in_proj_bias; unknown keys: audio.proj$"):
        cast.SpatialExpert(**SMALL).load(incomplete)


def test_missing_bias_is_an_error() -> None:
    state = cast.TemporalExpert(**SMALL).state_dict()
    del state["blocks.0.attn.v_bias"]
    with pytest.raises(ValueError, match=r"missing keys: blocks.0.attn.v_bias$"):
        cast.CAST(**SMALL).load_experts(videomae=state)


def test_failed_load_changes_nothing() -> None:
    model = cast.CAST(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = randomise(cast.SpatialExpert(**SMALL), seed=3).state_dict()
    del state["ln_post.bias"]
    with pytest.raises(ValueError, match=r"missing keys: ln_post\.bias"):
        model.load_experts(clip=state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bad_videomae_leaves_clip_as_it_was() -> None:
    model = cast.CAST(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clip, videomae = randomise(cast.SpatialExpert(**SMALL), seed=3), cast.TemporalExpert(**SMALL).state_dict()
    del videomae["blocks.0.attn.v_bias"]
    with pytest.raises(ValueError, match=r"missing keys: blocks\.0\.attn\.v_bias"):
        model.load_experts(clip=clip, videomae=videomae)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- files


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive of a half-precision CLIP, as OpenAI publishes."""
    path = tmp_path_factory.mktemp("clip") / "ViT.pt"
    torch.jit.script(open_clip_model().half()).save(path)
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit:")
def test_torchscript_archive_is_read_as_torch_reads_it(archive: Path) -> None:
    expected = torch.jit.load(archive).state_dict()
    tensors = read_torchscript(archive)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:")
def test_torchscript_archive_loads_without_running(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", None)
    model = cast.CAST(**SMALL).load_experts(clip=archive)
    visual = open_clip_model().half().visual
    assert model.clip_ln_pre.weight.dtype == torch.float32
    assert torch.equal(model.clip_conv1.weight, visual.conv1.weight.float())
    expected = visual.transformer.resblocks[1].attn.in_proj_weight.float()
    assert torch.equal(model.blocks[1].clip_attn.in_proj_weight, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:")
def test_torchscript_views_share_a_storage(tmp_path: Path) -> None:
    module = torch.nn.Module()
    whole = torch.randn(4, 6)
    views = {"whole": whole, "turned": whole.t(), "part": whole[1:, ::2]}
    for name, tensor in (views | {"ids": torch.arange(3), "empty": torch.empty(0, 3)}).items():
        module.register_buffer(name, tensor)
    torch.jit.script(module).save(tmp_path / "views.pt")
    tensors = read_torchscript(tmp_path / "views.pt")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in module.state_dict().items())


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_pickled_runs_without_consent(golden: Weights, tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "cast.pth"
    torch.save({"model": under(golden, "weight."), "extra": Trap(sprung)}, file)
    with pytest.raises(ValueError, match=r"more than tensors \(.*\).*trust_pickle=True"):
        cast.load_official_checkpoint(file, num_heads=4)
    for expert in ("clip", "videomae"):
        with pytest.raises(ValueError, match=r"trust_pickle=True"):
            cast.CAST(**SMALL).load_experts(**{expert: file})
    assert not sprung.exists()
    cast.load_official_checkpoint(file, num_heads=4, trust_pickle=True)
    assert sprung.exists()


def test_torchscript_with_foreign_objects_is_refused(tmp_path: Path) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "clip.pt"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("clip/constants.pkl", b"")
        zipped.writestr("clip/data.pkl", pickle.dumps(Trap(sprung), protocol=2))
    for trust in (False, True):  # consent is for torch files; nothing in an archive of weights needs it
        with pytest.raises(ValueError, match="refused"):
            cast.CAST(**SMALL).load_experts(clip=file, trust_pickle=trust)
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["empty.pt", "text.pth", "cut.pt", "text.safetensors"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pt")
    content = {"empty": b"", "text": b"hello world", "cut": (tmp_path / "whole.pt").read_bytes()[:400]}
    (tmp_path / name).write_bytes(content[name.split(".")[0]])
    with pytest.raises(ValueError, match=f"cannot read .*{name}: damaged, or no checkpoint"):
        cast.load_official_checkpoint(tmp_path / name)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        cast.load_official_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors"):
        cast.CAST(**SMALL).load_experts(clip=tmp_path)
    with pytest.raises(TypeError, match="weights came as int; give a path, a state dict or a module"):
        cast.load_official_checkpoint(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="other than tensors under: lr"):
        cast.load_official_checkpoint({"model": {"a": torch.zeros(1), "lr": 1}})
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        cast.load_official_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"'head\.weight' twice"):
        cast.load_official_checkpoint({"head.weight": torch.zeros(1), "module.head.weight": torch.zeros(1)})


# -- our own


@pytest.mark.parametrize("fused", [True, False])
def test_round_trip_after_training(fused: bool, tmp_path: Path) -> None:
    model = small_model(heads={"verb": 5, "noun": 3}, fused=fused, drop_path=0.1).float().train()
    video = small_video(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        sum(logits.square().sum() for logits in model(video).values()).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "checkpoint")
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for again in (True, False):
        loaded = cast.CAST.from_pretrained(tmp_path / "checkpoint", fused=again)
        assert loaded.config == model.config
        assert not loaded.training
        assert {block.backend for block in loaded.blocks} == {"auto" if again else "eager"}
        trains = [name for name, p in model.named_parameters() if p.requires_grad]
        assert [name for name, p in loaded.named_parameters() if p.requires_grad] == trains
    loaded = cast.CAST.from_pretrained(str(tmp_path / "checkpoint"), fused=fused)
    expected = model.eval()(video)
    assert all(torch.equal(logits, expected[name]) for name, logits in loaded(video).items())
    assert loaded.train()(video)["verb"].requires_grad


def test_saved_file_has_the_official_layout(tmp_path: Path) -> None:
    model = small_model(embed_dim=128, depth=1).float()
    model.save_pretrained(tmp_path)
    again = cast.load_official_checkpoint(tmp_path)
    video = small_video(model, dtype=torch.float32)
    assert again.config == model.config
    assert torch.equal(again(video)["action"], model.eval()(video)["action"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trip_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = cast.CAST.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    video = small_video(model, dtype=dtype)
    assert torch.equal(loaded(video)["action"], model(video)["action"])


def test_bad_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        cast.CAST.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"depht": 2}')
    with pytest.raises(TypeError, match="did you mean 'depth'"):
        cast.CAST.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        cast.CAST.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[2]")
    with pytest.raises(ValueError, match=r"config\.json holds a list; expected CASTConfig's fields"):
        cast.CAST.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"depth": 1}')
    with pytest.raises(
        ValueError,
        match=r"does not fit this model; unknown keys: blocks\.1\..*; other shapes: clip_class_embedding is \[16\]",
    ):
        cast.CAST.from_pretrained(tmp_path)
