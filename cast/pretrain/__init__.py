"""VideoMAE pre-training (arXiv 2203.12602) of a temporal expert on videos without labels."""

from cast.pretrain.model import Reconstruction, VideoMAE
from cast.pretrain.settings import DecoderSettings, PretrainSettings

__all__ = ["DecoderSettings", "PretrainSettings", "Reconstruction", "VideoMAE"]
