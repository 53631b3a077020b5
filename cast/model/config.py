"""`CASTConfig`: everything that the paper's ablations vary, checked once, hashable and serialisable."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cast_kernels import DIRECTIONS, WINDOWS

#: Head layouts of the published models: one head over both experts, or noun and verb apart (Fig. 9).
COMPOSITIONAL = frozenset({"verb", "noun"})

#: Tolerance for the rounding error of a ratio of two widths.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class CASTConfig:
    """Sizes and switches of one CAST model. The defaults are CAST-B/16 with Kinetics-400's head.

    Args:
        image_size: height and width of a frame, in pixels; a multiple of `patch_size`.
        patch_size: side of a patch of either expert, in pixels.
        num_frames: frames of a clip, a multiple of `tubelet_size`.
        tubelet_size: frames in one temporal token; the spatial expert sees the last frame of each tubelet.
        embed_dim: D, width of both experts.
        depth: number of blocks.
        num_heads: attention heads, the same in self-attention and exchange.
        mlp_ratio: hidden width of the experts' FFNs over D.
        adapter_ratio: hidden width of the adapters over D.
        down_ratio: D over the exchange's bottleneck width (Table 1(d)); heads must divide the bottleneck.
        heads: name -> number of classes. Either one name (one head over both experts), or `verb` and `noun`
            (verb from the temporal expert, noun from the spatial one). Stored as a sorted tuple of pairs.
        windows: window shapes of the (t2s, s2t) exchange (Table 1(e)).
        directions: which directions exchange (Table 1(g)); none = two experts that do not see each other.
        positions: whether the exchange has positional embeddings (Table 8).
        exchange_layers: 0-based blocks with an exchange (Table 1(f)); None = all. `range(9, 12)` is "layers 10-12".
        drop_path: rate at the last block; grows linearly from 0 at the first.
        drop_path_mode: how a spatial draw drops. `official`: token positions, the same for the whole batch, as in the
            published code's token-first layout. `sample`: clips. Temporal draws drop clips in both.
        head_dropout: dropout rate before the heads.
        init_scale: factor on the heads' initial weights.

    Raises:
        ValueError: a value that no model can have; the message names it and what is allowed.
    """

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    adapter_ratio: float = 0.25
    down_ratio: float = 2.0
    heads: Mapping[str, int] | tuple[tuple[str, int], ...] = (("action", 400),)
    windows: tuple[str, str] = ("time", "space")
    directions: tuple[str, ...] = DIRECTIONS
    positions: bool = True
    exchange_layers: tuple[int, ...] | None = None
    drop_path: float = 0.0
    drop_path_mode: Literal["official", "sample"] = "official"
    head_dropout: float = 0.0
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        try:
            heads = dict(self.heads)
        except (TypeError, ValueError):
            raise ValueError(
                f"heads is {self.heads!r}; it must give a number of classes by name, such as {{'action': 400}}"
            ) from None
        if len(heads) != len(self.heads):
            raise ValueError(f"heads is {self.heads!r}; every name may come once")
        self._set("heads", tuple(sorted(heads.items())))
        self._set("windows", _items("windows", self.windows))
        self._set("directions", tuple(d for d in DIRECTIONS if d in _names("directions", self.directions, DIRECTIONS)))
        if self.exchange_layers is not None:
            self._set("exchange_layers", tuple(sorted(set(_items("exchange_layers", self.exchange_layers)))))
        self._check_sizes()
        self._check_exchange()
        self._check_heads()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        for name in ("image_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        for whole, part in (
            ("image_size", "patch_size"),
            ("num_frames", "tubelet_size"),
            ("embed_dim", "num_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not divisible by {part} {getattr(self, part)}; "
                    f"choose a {whole} that is a multiple of it"
                )
        for name in ("mlp_ratio", "adapter_ratio", "down_ratio", "drop_path", "head_dropout", "init_scale"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; it must be a finite number")
        for name, rate in (("drop_path", self.drop_path), ("head_dropout", self.head_dropout)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate!r}; a rate lies in [0, 1)")
        if self.drop_path_mode not in ("official", "sample"):
            raise ValueError(f"drop_path_mode is {self.drop_path_mode!r}; it must be 'official' or 'sample'")
        for name, width in (("mlp_ratio", self.mlp_dim), ("adapter_ratio", self.adapter_dim)):
            if width < 1:
                raise ValueError(f"{name} {getattr(self, name)!r} leaves no hidden channel of {self.embed_dim}")

    def _check_exchange(self) -> None:
        if len(self.windows) != 2 or any(window not in WINDOWS for window in self.windows):
            raise ValueError(f"windows is {self.windows!r}; it must be two (t2s, s2t) out of {', '.join(WINDOWS)}")
        width = self.embed_dim / self.down_ratio if self.down_ratio > 0 else 0
        if width < 1 or abs(width - self.bottleneck_dim) > _ROUNDING or self.bottleneck_dim % self.num_heads:
            raise ValueError(
                f"down_ratio {self.down_ratio!r} makes a bottleneck of {width:g} channels out of {self.embed_dim}; "
                f"it must be a whole multiple of num_heads {self.num_heads}"
            )
        for layer in self.exchange_layers or ():
            if not isinstance(layer, int) or not 0 <= layer < self.depth:
                raise ValueError(f"exchange_layers has {layer!r}; blocks count from 0 to {self.depth - 1}")

    def _check_heads(self) -> None:
        if len(self.classes) != 1 and not self.compositional:
            raise ValueError(
                f"heads is {self.classes!r}; allowed are one head under any name, such as {{'action': 400}}, "
                "or the compositional pair {'verb': 97, 'noun': 300}"
            )
        for name, classes in self.classes.items():
            if not isinstance(classes, int) or classes < 1:
                raise ValueError(f"head {name!r} has {classes!r} classes; it needs an integer of at least 1")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of a frame."""
        return self.grid**2

    @property
    def exchange_frames(self) -> int:
        """T, frames that the exchange and the spatial expert see."""
        return self.num_frames // self.tubelet_size

    @property
    def bottleneck_dim(self) -> int:
        """d, width inside the exchange."""
        return round(self.embed_dim / self.down_ratio)

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the experts' FFNs."""
        return int(self.embed_dim * self.mlp_ratio + _ROUNDING)

    @property
    def adapter_dim(self) -> int:
        """Hidden width of the adapters."""
        return int(self.embed_dim * self.adapter_ratio + _ROUNDING)

    @property
    def classes(self) -> dict[str, int]:
        """`heads` as a dictionary: name -> number of classes."""
        return dict(self.heads)

    @property
    def compositional(self) -> bool:
        """Whether verb and noun have heads of their own."""
        return self.classes.keys() == COMPOSITIONAL

    def drop_rate(self, block: int) -> float:
        """Drop-path rate of one block: 0 at the first, `drop_path` at the last."""
        return self.drop_path * block / max(self.depth - 1, 1)

    def exchanges(self, block: int) -> bool:
        """Whether one block has an exchange."""
        return bool(self.directions) and (self.exchange_layers is None or block in self.exchange_layers)

    def exchange_sizes(self) -> dict[str, Any]:
        """The arguments of `cast_kernels.BCAST` for this configuration, without the directions."""
        return {
            "dim": self.embed_dim,
            "bottleneck_dim": self.bottleneck_dim,
            "num_heads": self.num_heads,
            "num_frames": self.exchange_frames,
            "num_patches": self.num_patches,
            "windows": self.windows,
            "positions": self.positions,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `CASTConfig(**config.to_dict()) == config`."""
        return asdict(self) | {"heads": self.classes}


#: Named sizes. Unlisted fields keep CASTConfig's default.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},  # the paper's CAST-B/16
    "small": {"embed_dim": 384, "num_heads": 6},  # ViT-S/16 experts
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},  # ViT-L/16 experts
    "tiny": {"image_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4},  # trains on two CPU cores
}


def make_config(
    variant: str | CASTConfig = "base", heads: Mapping[str, int] | None = None, **overrides: Any
) -> CASTConfig:
    """A named variant, or a configuration to start from, with fields replaced.

    Raises:
        ValueError: an unknown variant, or a value that CASTConfig refuses.
        TypeError: an override that is no field of CASTConfig; the message names the closest one and all of them.
    """
    allowed = [field.name for field in fields(CASTConfig)]
    for name in overrides:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"unknown override {name!r}; {hint}Allowed are {', '.join(allowed)}")
    if heads is not None:
        overrides["heads"] = heads
    if isinstance(variant, CASTConfig):
        base = variant.to_dict()
    elif variant in VARIANTS:
        base = VARIANTS[variant]
    else:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
    return CASTConfig(**(base | overrides))


def _items(what: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{what} is {given!r}; it must be a tuple")
    return tuple(given)


def _names(what: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    if (
        isinstance(given, str)
        or not isinstance(given, Iterable)
        or not set(given) <= set(allowed)
        or len(set(given)) != len(given)
    ):
        raise ValueError(f"{what} is {given!r}; it must be a tuple with any of {', '.join(map(repr, allowed))}")
    return given
