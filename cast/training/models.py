"""The recipe's model with its experts' weights, and the finished model as a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cast.baselines import DESIGNS, SINGLES, SingleExpert, TwoStream
from cast.baselines.streams import ExpertStream
from cast.ground.sampling import Sampling, write_sampling
from cast.model import CAST, TRAINABLE, load_official_checkpoint
from cast.model.config import CASTConfig, make_config
from cast.training.settings import DOWNLOAD, ExpertSettings, TrainSettings
from cast.training.tensors import read_weights

#: Models that a recipe can train.
Model: TypeAlias = CAST | TwoStream | SingleExpert


def configure(settings: TrainSettings, classes: Mapping[str, Sequence[str]]) -> CASTConfig:
    """The recipe's model with the data's heads.

    Raises:
        ValueError: the recipe names other heads than the data has.
    """
    heads = {head: len(names) for head, names in classes.items()}
    default = CASTConfig().heads
    if settings.model.heads != default and settings.model.classes != heads:
        raise ValueError(f"model.heads is {settings.model.classes}, the data has {heads}: leave model.heads out")
    return make_config(settings.model, heads=heads)


def build(settings: TrainSettings, classes: Mapping[str, Sequence[str]]) -> tuple[Model, list[str]]:
    """The recipe's model before the first step, in fp32 on the CPU: CAST, or a baseline of `cast.baselines`.

    Returns:
        The model, and notes about its weights for the user.

    Raises:
        ValueError: no weights for an expert that stays frozen, or weights that do not fit.
        FileNotFoundError: no such file.
        MissingExtraError: an expert of timm, and timm is not installed.
    """
    experts = settings.experts
    torch.manual_seed(settings.seed)
    missing = [] if experts.cast else [name for name in experts.sources if not getattr(experts, name)]
    if missing and not experts.train:
        whole = "a whole CAST as experts.cast, " if experts.design == "cast" else ""
        raise ValueError(
            f"experts.{missing[0]} names no weights, and a frozen expert without weights is useless. Give the file "
            f"(docs/training.md says where weights come from), {whole}or experts.train=true to train the experts too, "
            "from random weights"
        )
    model = _make(settings, configure(settings, classes))
    notes = [f"expert {name} starts from random weights" for name in missing]
    if experts.cast:
        assert isinstance(model, CAST)
        notes += _start_from(model, experts.cast, experts.trust_pickle)
    else:
        _initialise(model, experts, missing)
        _load_experts(model, experts)
    if experts.train:
        model.requires_grad_(True)
    return model, notes


def _make(settings: TrainSettings, config: CASTConfig) -> Model:
    experts, run = settings.experts, settings.run
    running: dict[str, Any] = {"fused": run.fused, "recompute": run.recompute, "attention": run.attention}
    if experts.design == "cast":
        return CAST(config, **running, stream_dtype=run.stream_dtype)
    if run.stream_dtype != "auto":
        raise ValueError(f"run.stream_dtype is {run.stream_dtype}; experts.design {experts.design} has auto only")
    if experts.design in SINGLES:
        return SingleExpert(*SINGLES[experts.design], config, **running)
    downloads = {role: {"pretrained": True} for role in experts.roles if getattr(experts, role) == DOWNLOAD}
    return TwoStream(DESIGNS[experts.design], config, timm_options=downloads, **running)


def _load_experts(model: Model, experts: ExpertSettings) -> None:
    if isinstance(model, CAST):
        model.load_experts(experts.clip, experts.videomae, experts.trust_pickle)
        return
    for role, name in experts.roles.items():
        source = getattr(experts, name if name in experts.sources else role)
        if source and source != DOWNLOAD:
            _stream(model, role).load(source, experts.trust_pickle)


def _stream(model: TwoStream | SingleExpert, role: str) -> ExpertStream:
    stream = model.stream if isinstance(model, SingleExpert) else model.get_submodule(role)
    assert isinstance(stream, ExpertStream)
    return stream


def _start_from(model: CAST, source: str, trust_pickle: bool) -> list[str]:
    """Copy the weights of a whole CAST; heads with another number of classes stay new."""
    path = Path(source)
    whole = CAST.from_pretrained(path) if path.is_dir() else load_official_checkpoint(path, trust_pickle=trust_pickle)
    given, own = whole.state_dict(), model.state_dict()
    fresh = [key for key in own if key.startswith("head") and (key not in given or given[key].shape != own[key].shape)]
    differing = [
        key for key in own if key not in fresh and (key not in given or given[key].shape != own[key].shape)
    ] + [key for key in given if key not in own and not key.startswith("head")]
    # The last adapters belong to the one-head layout; either model may lack them.
    differing = [key for key in differing if "_last_Adapter" not in key]
    if differing:
        raise ValueError(f"experts.cast={source} does not fit the recipe's model: {', '.join(differing[:8])} differ")
    taken = {key: tensor for key, tensor in given.items() if key in own and key not in fresh}
    model.load_state_dict(taken, strict=False)
    return [f"new heads, as the classes differ: {', '.join(fresh)}"] if fresh else []


def _initialise(model: Model, experts: ExpertSettings, missing: Sequence[str]) -> None:
    """Glorot's initialisation for the matrices of experts without weights, as in VideoMAE's pre-training.

    The standard deviation of fine-tuned models, 0.02, fits a width of 768. In small models the signal almost vanishes
    with it.
    """
    if isinstance(model, CAST):
        named = [(n, p) for n, p in model.named_parameters() if not TRAINABLE.search(n)]
        fresh = [(n, p) for n, p in named if ("clip" if "clip_" in n else "videomae") in missing]
    else:
        roles = [role for role, name in experts.roles.items() if (name if name in missing else role) in missing]
        fresh = [entry for role in roles for entry in _stream(model, role).named_parameters()]
    for name, parameter in fresh:
        if parameter.ndim > 1 and name.endswith("weight"):
            nn.init.xavier_uniform_(parameter.detach().flatten(1))


def compile_blocks(model: nn.Module, backend: str) -> None:
    """Apply torch.compile to each block in place: names stay, and equal blocks are compiled once.

    A baseline is compiled as a whole, because its blocks do not run alone.

    Raises:
        ValueError: no such backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"run.compile is {backend!r}; it must be null or one of {', '.join(known)}")
    blocks: Any = getattr(model, "blocks", None)
    whole = not isinstance(blocks, nn.ModuleList) or isinstance(model, TwoStream | SingleExpert)
    for module in [model] if whole else blocks:
        module.compile(backend=backend)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor, not sharded, on the CPU. All processes must call this."""
    return read_weights(model, everything=True)


def blueprint(model: Model) -> Callable[[], Model]:
    """A function that makes a model of the same configuration, without its weights."""
    config = model.config
    if isinstance(model, SingleExpert):
        expert, adapters = model.expert, model.adapters
        return lambda: SingleExpert(expert, adapters, config)
    if isinstance(model, TwoStream):
        design = model.design
        options = {role: {**chosen, "pretrained": False} for role, chosen in model.timm_options.items()}
        return lambda: TwoStream(design, config, timm_options=options)
    return lambda: CAST(config)


def save_finished(
    make: Callable[[], Model],
    tensors: Mapping[str, Tensor],
    classes: Mapping[str, Sequence[str]],
    sampling: Sampling,
    directory: Path,
    short_side: int | None = None,
) -> None:
    """Write a directory that `from_pretrained` and `cast evaluate` load, with class names and the clips' sampling.

    Args:
        make: makes a model of the same configuration, without weights.
        tensors: the weights.
        classes: class names by head.
        sampling: of the training's frames.
        directory: receives the files.
        short_side: size in pixels to which the training shrank larger pictures.
    """
    model = make()
    model.load_state_dict(tensors)
    model.save_pretrained(directory)
    names = {head: list(own) for head, own in classes.items()}
    (directory / "labels.json").write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_sampling(directory, sampling, short_side)


def how_to_use(model: Model, directory: Path) -> str:
    """A sentence for the user: commands that load a finished model."""
    kind = "CAST" if isinstance(model, CAST) else f"cast.baselines.{type(model).__name__}"
    return f"{directory} loads with cast predict --checkpoint, cast evaluate and {kind}.from_pretrained"
