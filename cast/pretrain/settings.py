"""The settings of a pre-training recipe. The defaults are VideoMAE's published ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from cast.model.config import CASTConfig, make_config
from cast.training.settings import OptimSettings, RecipeSettings
from cast.video.sampling import STRIDE


@dataclass(frozen=True)
class DecoderSettings:
    """The decoder; only the pre-training uses it.

    Args:
        depth: blocks.
        width: channels; null for half the encoder's.
        heads: attention heads; null for half the encoder's.
    """

    depth: int = 4
    width: int | None = None
    heads: int | None = None

    def config(self, encoder: CASTConfig) -> CASTConfig:
        """The decoder's sizes.

        Raises:
            ValueError: impossible sizes.
        """
        width = encoder.embed_dim // 2 if self.width is None else self.width
        heads = max(1, encoder.num_heads // 2) if self.heads is None else self.heads
        try:
            # Nothing exchanges here, so any bottleneck that the heads divide is valid.
            return make_config(encoder, depth=self.depth, embed_dim=width, num_heads=heads, down_ratio=1.0)
        except ValueError as error:
            raise ValueError(f"the decoder of {self.depth} blocks, {width} channels, {heads} heads: {error}") from None


def _published() -> OptimSettings:
    return OptimSettings(
        epochs=800,
        total_batch=1024,
        micro_batch=16,
        clip_grad=None,
        lr=1.5e-4,
        min_lr=1e-5,
        warmup_epochs=40,
        weight_decay=0.05,
        layer_decay=1.0,
        betas=(0.9, 0.95),
    )


@dataclass(frozen=True)
class PretrainSettings(RecipeSettings):
    """A recipe of `cast pretrain`; videomae.safetensors and reconstruction.png go to <out>.

    Labels are not used: `data.train: null` takes every video below `data.root`. Of the model only the temporal expert's
    sizes have an effect.

    Args:
        optim: optimizer, batch and schedule.
        decoder: sizes of the decoder.
        mask_ratio: hidden share of the patches.
        normalised: whether each patch's target has mean 0 and deviation 1 in each colour.
        stride: frames between two of a clip's frames, if data.sampling is dense.
        pictures: clips in reconstruction.png; 0 for no picture.
    """

    optim: OptimSettings = field(default_factory=_published)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    mask_ratio: float = 0.9
    normalised: bool = True
    stride: int = STRIDE
    pictures: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must lie between 0 and 1")
        if self.run.graphs:
            raise ValueError(
                "run.graphs is for cast train: pre-training draws a mask on the CPU in every pass; set it false"
            )
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; it must be at least 1 frame")
        if self.pictures < 0:
            raise ValueError(f"pictures is {self.pictures}; it must be 0 or more clips")
        for name in ("mixup", "cutmix", "smoothing"):
            if getattr(self.data.augment, name):
                raise ValueError(
                    f"data.augment.{name} is {getattr(self.data.augment, name)}; there are no labels to mix or smooth, "
                    "and clips are not mixed in pre-training: set it to 0"
                )
