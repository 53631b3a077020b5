"""One expert with heads for verb and noun, and ensembles of models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cast.baselines.saved import load_saved, read_saved, write_saved
from cast.baselines.streams import ExpertStream
from cast.baselines.two_stream import make_stream
from cast.model.config import CASTConfig, make_config
from cast.model.layers import Adapter, Running, drop_factor, init_linears
from cast.model.weights.source import Source
from cast_kernels import Recompute


class SingleExpert(nn.Module):
    """One expert with a head for every label, for example half of Table 1(a)'s ensemble.

    Args:
        expert: `clip`, `videomae`, `mvd` or `timm:NAME`.
        adapters: `none`, `cast` (two a block) or `aim` (CLIP's three).
        config: sizes and heads.
        fused: whether ops may run in compiled kernels.
        recompute, attention: as in :class:`cast.CAST`.
        overrides: fields of CASTConfig.
    """

    config: CASTConfig

    def __init__(
        self,
        expert: str,
        adapters: Literal["none", "cast", "aim"] = "cast",
        config: CASTConfig | str = "base",
        fused: bool = True,
        recompute: Recompute | str = "auto",
        attention: str = "auto",
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = make_config(config, **overrides)
        if adapters == "aim" and expert != "clip":
            raise ValueError(f"adapters 'aim' are CLIP's; the expert is {expert!r}, choose 'cast' or 'none'")
        self.expert = expert
        self.stream: ExpertStream = make_stream(
            expert, config, Running("auto" if fused else "eager", recompute, attention)
        )
        self.stream.requires_grad_(adapters == "none")
        self.stream.last_norm().requires_grad_(True)
        names = {"none": (), "cast": ("Adapter", "MLP_Adapter"), "aim": ("Adapter", "MLP_Adapter", "Time_Adapter")}
        self.blocks: nn.ModuleList = nn.ModuleList(
            nn.ModuleDict({name: Adapter(config.embed_dim, config.adapter_dim) for name in names[adapters]})
            for _ in range(config.depth)
        )
        self.heads: nn.ModuleDict = nn.ModuleDict(
            {name: nn.Linear(config.embed_dim, n) for name, n in config.classes.items()}
        )
        init_linears(self.blocks, self.heads)
        if adapters == "aim":
            self.time_positional_embedding: nn.Parameter = nn.Parameter(
                torch.zeros(config.exchange_frames, 1, config.embed_dim)
            )
        self.adapters = adapters

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """[B, 3, frames, H, W], normalised -> logits by head, [B, classes]."""
        x = self.stream.embed(video)
        if self.adapters == "aim":
            x = x + self.time_positional_embedding
        for index, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleDict)
            adapters: dict[str, Any] = dict(block.items())
            if "Time_Adapter" in adapters:
                x = self.stream.attend_over_time(index, x, adapters["Time_Adapter"])
            x = self.stream.attend(index, x, adapters.get("Adapter"))
            rate = self.config.drop_rate(index)
            factor = drop_factor((x.shape[0],), rate, x) if self.training and rate and adapters else None
            x = self.stream.feed(index, x, adapters.get("MLP_Adapter"), factor)
        features = self.stream.pool(x)
        features = nn.functional.dropout(features, self.config.head_dropout, self.training)
        return {name: head(features) for name, head in self.heads.items()}

    def load_expert(self, source: Source, trust_pickle: bool = False) -> SingleExpert:
        """Put pre-trained weights into the expert; see `ExpertStream.load`."""
        self.stream.load(source, trust_pickle)
        return self

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` (with the expert and its adapters) and `model.safetensors` into a directory."""
        about = {"expert": self.expert, "adapters": self.adapters, "config": self.config.to_dict()}
        write_saved(self, about, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], fused: bool = True) -> SingleExpert:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no `config.json` or `model.safetensors`.
            ValueError: a `config.json` of another kind of model, or other tensors.
        """
        about = read_saved(directory, "expert")
        model = cls(about["expert"], about["adapters"], make_config(**about["config"]), fused)
        load_saved(model, directory)
        return model.eval()


class Ensemble(nn.Module):
    """Models, trained separately, whose probabilities are averaged at test time (Table 1(a) 'Ensemble of experts').

    Its logits are the logarithms of the mean probabilities, so that a softmax gives the means. Do not train it: its
    members are trained separately.

    Raises:
        ValueError: no members.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble has no members; give at least one trained model")
        self.members: nn.ModuleList = nn.ModuleList(members)

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Inputs of the members -> logits by head, [B, classes].

        Raises:
            ValueError: members with different heads.
        """
        answers = [member(video) for member in self.members]
        if any(answer.keys() != answers[0].keys() for answer in answers):
            raise ValueError(f"the members have heads {[sorted(answer) for answer in answers]}; they must agree")
        return {
            name: torch.stack([answer[name].float().softmax(-1) for answer in answers]).mean(0).log()
            for name in answers[0]
        }
