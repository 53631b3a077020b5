"""Published models by name, and models as directories on the disk and on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import randomise
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import LocalEntryNotFoundError

import cast
from cast.model import hub, zoo
from cast.model.zoo import MODELS, PublishedModel, create_model, load

HEADS = {"verb": 3, "noun": 4}
NAMES = {"verb": ["open", "close", "cut"], "noun": ["door", "tap", "onion", "drawer"]}


@pytest.fixture
def model() -> cast.CAST:
    torch.manual_seed(0)
    found = randomise(cast.CAST("tiny", heads=HEADS))
    found.labels = NAMES
    return found


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A published model of the smallest size, and the directory where it should be."""
    monkeypatch.setitem(
        MODELS, "cast_tiny_test", PublishedModel("the tests", HEADS, 1.0, "https://example.org", "tiny")
    )
    monkeypatch.setenv("CAST_MODELS", str(tmp_path))
    return tmp_path


def same(a: cast.CAST, b: cast.CAST) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_published_models_have_names_and_addresses() -> None:
    assert cast.list_models() == ["cast_base_ek100", "cast_base_ssv2", "cast_base_k400"]
    heads = [MODELS[name].heads for name in cast.list_models()]
    assert heads == [{"verb": 97, "noun": 300}, {"action": 174}, {"action": 400}]
    assert len({model.url for model in MODELS.values()}) == 3
    with torch.device("meta"):
        new = create_model("cast_base_ek100", pretrained=False, drop_path=0.2)
    assert (new.config.classes, new.config.drop_path) == ({"verb": 97, "noun": 300}, 0.2)
    assert sum(p.numel() for p in new.parameters()) == 216_808_333  # as the official model has


@pytest.mark.parametrize("name", ["cast_base_ek100", "cast_base_ssv2", "cast_base_k400"])
def test_a_missing_file_is_named_with_where_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        create_model(name, directory=tmp_path)
    for part in (f"{tmp_path / name}.pth", MODELS[name].url, "github.com/KHU-VLL/CAST", "CAST_MODELS"):
        assert part in str(caught.value)


def test_an_official_file_is_found_by_the_environment(
    tiny: Path, model: cast.CAST, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"backbone.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"module": tensors}, tiny / "cast_tiny_test.pth")
    found = create_model("cast_tiny_test")
    assert same(found, model)
    assert found.config.num_heads == 4  # which no shape tells
    assert same(load("cast_tiny_test"), model)
    assert same(create_model("cast_tiny_test", directory=tiny), model)
    monkeypatch.setenv("HOME", str(tiny.parent))
    monkeypatch.setenv("CAST_MODELS", f"~/{tiny.name}")  # as a quoted assignment or a service's file leaves it
    assert same(create_model("cast_tiny_test"), model)


def test_a_directory_of_ours_is_found_too(tiny: Path, model: cast.CAST) -> None:
    model.save_pretrained(tiny / "cast_tiny_test")
    assert same(create_model("cast_tiny_test", fused=False), model)
    model.save_pretrained(tiny / "run" / "model")
    assert same(load(tiny / "run"), model)


def test_a_directorys_own_sampling_counts_more_than_the_names(tiny: Path, model: cast.CAST) -> None:
    model.save_pretrained(tiny / "cast_tiny_test")
    assert create_model("cast_tiny_test").sampling == "uniform"
    model.sampling = "dense"
    model.save_pretrained(tiny / "cast_tiny_test")
    assert create_model("cast_tiny_test").sampling == "dense"


def test_another_model_under_the_name_is_refused(tiny: Path) -> None:
    other = cast.CAST("tiny", heads={"action": 5})
    torch.save(other.state_dict(), tiny / "cast_tiny_test.pt")
    with pytest.raises(ValueError, match=r"is not cast_tiny_test: it has heads \{'action': 5\}, not \{'noun': 4"):
        create_model("cast_tiny_test")


def test_bad_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no model 'cast_base_ek10'; did you mean 'cast_base_ek100'"):
        create_model("cast_base_ek10")
    with pytest.raises(ValueError, match="drop_path cannot be set for pre-trained weights"):
        create_model("cast_base_k400", drop_path=0.1)


def test_a_directory_keeps_names_and_gets_a_card(model: cast.CAST, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    found = cast.CAST.from_pretrained(tmp_path)
    assert same(found, model)
    assert found.labels == NAMES
    assert not found.training
    card = (tmp_path / "README.md").read_text()
    assert "video-classification" in card
    assert "2311.18825" in card
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "config.json", "labels.json", "model.safetensors",
    ]  # fmt: skip


def test_names_of_an_earlier_model_do_not_stay(model: cast.CAST, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.labels = None
    model.save_pretrained(tmp_path)
    assert cast.CAST.from_pretrained(tmp_path).labels is None


def test_a_directory_of_an_earlier_version_is_read(model: cast.CAST, tmp_path: Path) -> None:
    """It has no card and no names, and was written without either."""
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "labels.json").unlink()
    found = cast.CAST.from_pretrained(tmp_path)
    assert same(found, model)
    assert found.labels is None


def test_names_that_do_not_fit_are_refused(model: cast.CAST, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"verb": ["open"]}))
    with pytest.raises(ValueError, match=r"labels.json: must have a list of 4 names for 'noun'"):
        cast.CAST.from_pretrained(tmp_path)


def test_the_hub_gets_what_it_gives_back(model: cast.CAST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload and download through the mixin, with a folder in the Hub's place."""
    remote = tmp_path / "remote"

    class Api:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, remote / repo_id)
            return f"https://huggingface.co/{repo_id}/commit/1"

    asked = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(remote / repo_id)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert isinstance(model, PyTorchModelHubMixin)
    assert model.push_to_hub("me/digits") == "https://huggingface.co/me/digits/commit/1"
    found = cast.CAST.from_pretrained("me/digits", revision="v1", local_files_only=True)
    assert same(found, model)
    assert found.labels == NAMES
    assert (asked["revision"], asked["local_files_only"]) == ("v1", True)
    assert "model.safetensors" in asked["allow_patterns"]
    assert same(load("me/digits"), model)
    model.save_pretrained(tmp_path / "local", repo_id="me/again", push_to_hub=True)
    assert (remote / "me/again/model.safetensors").is_file()


def test_without_a_network_the_error_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("outgoing traffic is disabled\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    expected = r"me/digits: no such directory, and the Hugging Face Hub gave no such model \(outgoing"
    with pytest.raises(FileNotFoundError, match=expected):
        cast.CAST.from_pretrained("me/digits")
    with pytest.raises(FileNotFoundError, match="nothing: no such directory; give one that save_pretrained wrote"):
        cast.CAST.from_pretrained("nothing")


def test_a_configuration_of_the_callers_is_not_taken(model: cast.CAST, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="config is not taken"):
        model.save_pretrained(tmp_path, config={"depth": 1})
    assert zoo.list_models() is not MODELS
