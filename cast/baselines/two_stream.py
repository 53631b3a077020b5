"""`TwoStream`: any two experts in CAST's two roles, with any exchange, with or without adapters, frozen or trained.

With CLIP, VideoMAE, B-CAST and adapters it computes the same as :class:`cast.CAST` (a test compares them). Train and
publish CAST itself, because it has the published names and whole fused blocks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cast.baselines.exchange import Bottleneck, Exchange, Lateral, Wide
from cast.baselines.saved import load_saved, read_saved, write_saved
from cast.baselines.streams import CLIPStream, ExpertStream, MVDStream, VideoMAEStream
from cast.baselines.timm_stream import TimmStream
from cast.model.config import CASTConfig, make_config
from cast.model.heads import apply_heads, build_heads
from cast.model.layers import Adapter, Running, drop_factor, init_linears
from cast.model.weights.source import Source
from cast_kernels import Recompute

Exchanges = Literal["none", "b-cast", "lateral", "attention", "attention-adapter"]
Adapters = Literal["none", "cast", "aim"]
Fusion = Literal["apart", "add", "concat"]


@dataclass(frozen=True)
class Design:
    """The differences between the paper's two-stream models; the defaults are CAST.

    Args:
        spatial: the expert that T2S updates, and whose features give the noun: `clip`, `videomae`, `mvd`, or
            `timm:NAME` for an image model of timm.
        temporal: the expert that S2T updates, and whose features give the verb; the same choices. An expert keeps its
            own input, attention and pooling in either role.
        exchange: per block: `none`, `b-cast`, `lateral` (Table 1(b)), `attention` (Table 1(c) 'w/o adapter') or
            `attention-adapter` (Table 1(c) 'X-attn.->adapter').
        adapters: `none`; `cast`: one beside each half of each expert's block; `aim`: those, and CLIP's third along time
            with AIM's table of times.
        trained: `new`: adapters, exchange, last norms, heads; `all`: the experts too.
        fusion: of the pooled features: `apart` (CAST's heads), `add`, or `concat` (joined, then projected to D).

    Raises:
        ValueError: another value.
    """

    spatial: str = "clip"
    temporal: str = "videomae"
    exchange: Exchanges = "b-cast"
    adapters: Adapters = "cast"
    trained: Literal["new", "all"] = "new"
    fusion: Fusion = "apart"

    def __post_init__(self) -> None:
        allowed = {"exchange": Exchanges, "adapters": Adapters, "trained": Literal["new", "all"], "fusion": Fusion}
        for name, choices in allowed.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(choices))}")
        if self.adapters == "aim" and self.spatial != "clip":
            raise ValueError(
                f"adapters 'aim' are CLIP's; the spatial expert is {self.spatial!r}, choose 'cast' or 'none'"
            )


def make_stream(name: str, config: CASTConfig, running: Running, **timm_options: Any) -> ExpertStream:
    """The expert with this name and random weights.

    Raises:
        ValueError: an unknown name, or a timm model whose width, depth or grid differs from the configuration's.
    """
    if name.startswith("timm:"):
        return TimmStream(name.removeprefix("timm:"), config, running, **timm_options)
    streams: dict[str, type[ExpertStream]] = {"clip": CLIPStream, "videomae": VideoMAEStream, "mvd": MVDStream}
    if name not in streams:
        raise ValueError(f"unknown expert {name!r}; there are {', '.join(streams)}, and timm:NAME for timm's models")
    return streams[name](config, running)


class TwoStreamBlock(nn.Module):
    """The new parts of one block: adapters and exchange. The streams have the experts' layers."""

    def __init__(
        self, design: Design, config: CASTConfig, exchanges: bool, prefixes: tuple[int, int], running: Running
    ) -> None:
        super().__init__()
        names = ["S_Adapter", "S_MLP_Adapter", "T_Adapter", "T_MLP_Adapter"] if design.adapters != "none" else []
        names += ["S_Time_Adapter"] if design.adapters == "aim" else []
        for name in names:
            self.add_module(name, Adapter(config.embed_dim, config.adapter_dim))
        init_linears(self)
        self.exchange: Exchange | None = (
            _make_exchange(design.exchange, config, prefixes, running) if exchanges else None
        )

    def adapter(self, name: str) -> Adapter | None:
        return getattr(self, name, None)


class TwoStream(nn.Module):
    """Two experts in the roles of CAST's spatial and temporal one.

    Args:
        design: the two experts and their connection.
        config: sizes; `windows`, `directions`, `positions`, `down_ratio`, `exchange_layers` for the exchange. Drop path
            draws clips: on exchange and FFN adapters, as in CAST; and if the experts train, also on both their residual
            branches, as is usual for fine-tuned transformers (the paper does not say).
        fused: whether ops may run in compiled kernels; if not, they run in eager PyTorch.
        recompute, attention: as in :class:`cast.CAST`.
        timm_options: for a `timm:` expert, by role: {"spatial": {...}}; see `TimmStream`.
        overrides: fields of CASTConfig.
    """

    design: Design
    config: CASTConfig
    timm_options: dict[str, dict[str, Any]]

    def __init__(
        self,
        design: Design | None = None,
        config: CASTConfig | str = "base",
        fused: bool = True,
        timm_options: Mapping[str, Mapping[str, Any]] | None = None,
        recompute: Recompute | str = "auto",
        attention: str = "auto",
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.design, self.config = design or Design(), make_config(config, **overrides)
        config, running = self.config, Running("auto" if fused else "eager", recompute, attention)
        options = self.timm_options = {role: dict(chosen) for role, chosen in (timm_options or {}).items()}
        self.spatial: ExpertStream = make_stream(self.design.spatial, config, running, **options.get("spatial", {}))
        self.temporal: ExpertStream = make_stream(self.design.temporal, config, running, **options.get("temporal", {}))
        prefixes = (self.spatial.prefix, self.temporal.prefix)
        for name in ("spatial", "temporal"):
            self.get_submodule(name).requires_grad_(self.design.trained == "all")
        self.spatial.last_norm().requires_grad_(True)
        self.temporal.last_norm().requires_grad_(True)
        self.blocks: nn.ModuleList = nn.ModuleList(
            TwoStreamBlock(self.design, config, config.exchanges(index), prefixes, running)
            for index in range(config.depth)
        )
        if self.design.adapters == "aim":
            self.time_positional_embedding: nn.Parameter = nn.Parameter(
                torch.zeros(config.exchange_frames, 1, config.embed_dim)
            )
        for name, module in self._heads().items():
            self.add_module(name, module)

    def _heads(self) -> dict[str, nn.Module]:
        if self.design.fusion == "apart":
            return build_heads(self.config)
        dim = self.config.embed_dim
        modules: dict[str, nn.Module] = {f"head_{name}": nn.Linear(dim, n) for name, n in self.config.classes.items()}
        if self.design.fusion == "concat":
            modules["head_projection"] = nn.Linear(2 * dim, dim)
        init_linears(*modules.values())
        return modules

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """[B, 3, frames, H, W], normalised -> logits by head, [B, classes]."""
        spatial, temporal = self.features(video)
        if self.design.fusion == "apart":
            return apply_heads(self, self.config, spatial, temporal)
        if self.design.fusion == "add":
            joined = spatial + temporal
        else:
            joined = self.get_submodule("head_projection")(torch.cat((spatial, temporal), -1))
        joined = nn.functional.dropout(joined, self.config.head_dropout, self.training)
        return {name: self.get_submodule(f"head_{name}")(joined) for name in self.config.classes}

    def features(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> pooled and normalised features of the (spatial, temporal) expert, [B, D] each."""
        spatial, temporal = self.spatial.embed(video), self.temporal.embed(video)
        if self.design.adapters == "aim":
            spatial = spatial + self.time_positional_embedding
        for index, block in enumerate(self.blocks):
            assert isinstance(block, TwoStreamBlock)
            spatial = self._attend(self.spatial, index, spatial, block, "S")
            temporal = self._attend(self.temporal, index, temporal, block, "T")
            if block.exchange is not None:
                factors = (self._draw(index, spatial), self._draw(index, temporal))
                spatial, temporal = block.exchange(spatial, temporal, factors)
            spatial = self._feed(self.spatial, index, spatial, block.adapter("S_MLP_Adapter"))
            temporal = self._feed(self.temporal, index, temporal, block.adapter("T_MLP_Adapter"))
        return self.spatial.pool(spatial), self.temporal.pool(temporal)

    def _attend(self, stream: ExpertStream, index: int, x: Tensor, block: TwoStreamBlock, letter: str) -> Tensor:
        over_time = block.adapter(f"{letter}_Time_Adapter")
        if over_time is not None:
            x = stream.attend_over_time(index, x, over_time)
        return self._dropped(index, x, stream.attend(index, x, block.adapter(f"{letter}_Adapter")))

    def _feed(self, stream: ExpertStream, index: int, x: Tensor, adapter: Adapter | None) -> Tensor:
        factor = None if adapter is None else self._draw(index, x)
        return self._dropped(index, x, stream.feed(index, x, adapter, factor))

    def _dropped(self, index: int, before: Tensor, after: Tensor) -> Tensor:
        """Drop path on an expert's own residual branch, if the experts train."""
        factor = self._draw(index, before) if self.design.trained == "all" else None
        return after if factor is None else before + (after - before) * factor[:, None, None, None]

    def _draw(self, index: int, x: Tensor) -> Tensor | None:
        rate = self.config.drop_rate(index)
        return drop_factor((x.shape[0],), rate, x) if self.training and rate else None

    def load_experts(
        self, spatial: Source | None = None, temporal: Source | None = None, trust_pickle: bool = False
    ) -> TwoStream:
        """Load pre-trained weights into the experts, each in its own layout; the rest keeps its values.

        Raises:
            ValueError: missing keys, unknown keys, other shapes (all are listed), or an unreadable file.
        """
        if spatial is not None:
            self.spatial.load(spatial, trust_pickle)
        if temporal is not None:
            self.temporal.load(temporal, trust_pickle)
        return self

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` (with the design) and `model.safetensors` into a directory, made if needed."""
        about = {"design": asdict(self.design), "timm_options": self.timm_options, "config": self.config.to_dict()}
        write_saved(self, about, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], fused: bool = True) -> TwoStream:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no `config.json` or `model.safetensors`.
            ValueError: a `config.json` of another kind (CAST has its own `from_pretrained`), or other tensors.
        """
        about = read_saved(directory, "design")
        # No download: the directory has the weights.
        options = {role: {**chosen, "pretrained": False} for role, chosen in about["timm_options"].items()}
        model = cls(Design(**about["design"]), make_config(**about["config"]), fused, options)
        load_saved(model, directory)
        return model.eval()


def _make_exchange(name: Exchanges, config: CASTConfig, prefixes: tuple[int, int], running: Running) -> Exchange | None:
    if name == "none":
        return None
    if name == "b-cast":
        return Bottleneck(config, prefixes, running)
    if name == "lateral":
        return Lateral(config, prefixes, running)
    return Wide(config, prefixes, running, adapted=name == "attention-adapter")
