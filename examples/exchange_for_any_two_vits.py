"""B-CAST between any two vision transformers of timm: the experts stay frozen, adapters and exchange train.

    pip install -e '.[examples]'
    python examples/exchange_for_any_two_vits.py        # two small ones with random weights, seconds on a CPU
    python examples/exchange_for_any_two_vits.py --spatial vit_base_patch16_clip_224 --temporal vit_small_patch8_224 \\
        --size 224 --pretrained                         # timm downloads the weights

`cast_kernels.BCAST` needs two streams at an exchange: spatial [B, T, 1+N, D] with a class token first, temporal [B, T,
N, D] without. So T, N, D, dtype and device must be equal. Two models may differ in everything except T:

    width     a linear layer maps each stream to D, another one maps the result back
    patches   the finer grid is averaged to the coarser one; each averaged patch gets the result
    depth     there are as many exchanges as the shallower model has blocks; the deeper one runs several in between
    tokens    class token and registers of the temporal model are left out; the spatial model must have a class token

The exchange's up-projections start at zero, so before the first step both experts compute the same as alone. CAST
itself exchanges between attention and FFN; here the exchange follows whole blocks, so timm's code is unchanged.
"""

import argparse
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cast_kernels
from cast_kernels import BCAST, AdapterParameters

#: A clip's classes: each frame shows the size, and only a comparison of frames shows motion.
CLASSES = ("a small square stands", "a small square moves", "a large square stands", "a large square moves")

FITTING = "this example calls the parts of timm's VisionTransformer: choose a name that begins with vit_ or deit_"


class Adapter(nn.Module):
    """x + up(GELU(down(x))) by the fused operator; up starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, max(dim // 4, 1)), nn.Linear(max(dim // 4, 1), dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        parameters = AdapterParameters(self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return cast_kernels.adapter(x, parameters, residual=x)


class Expert(nn.Module):
    """A frozen model of timm whose blocks are called one by one, with adapters and projections to the exchange.

    Args:
        model: of timm's VisionTransformer.
        exchanges: number of exchanges.
        grid: rows and columns of patches at the exchange.
        dim: width at the exchange.
    """

    def __init__(self, model: Any, exchanges: int, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.model, self.grid, self.own_grid = model.requires_grad_(False), grid, model.patch_embed.grid_size
        self.prefix, width, depth = model.num_prefix_tokens, model.embed_dim, len(model.blocks)
        self.ends = [(number + 1) * depth // exchanges for number in range(exchanges)]
        self.adapters = nn.ModuleList(Adapter(width) for _ in range(exchanges))
        self.into = nn.ModuleList(nn.Linear(width, dim) for _ in range(exchanges))
        self.back = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(exchanges))

    def train(self, mode: bool = True) -> "Expert":
        """Set the adapters to training; the model stays in evaluation mode, without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def embed(self, frames: Tensor) -> Tensor:
        """[frames, 3, H, W] -> tokens [frames, prefix + patches, width]."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(frames))))

    def run(self, number: int, x: Tensor) -> Tensor:
        """Run the blocks between two exchanges, and an adapter."""
        for block in self.model.blocks[self.ends[number - 1] if number else 0 : self.ends[number]]:
            x = block(x)
        return self.adapters[number](x)

    def to_exchange(self, number: int, x: Tensor, class_token: bool) -> Tensor:
        """[B*T, own tokens, width] -> [B*T, (1+)N, D]."""
        patches = x[:, self.prefix :].unflatten(1, self.own_grid).movedim(-1, 1)
        patches = F.adaptive_avg_pool2d(patches, self.grid).flatten(2).transpose(1, 2)
        return self.into[number](torch.cat([x[:, :1], patches], 1) if class_token else patches)

    def from_exchange(self, number: int, x: Tensor, added: Tensor, class_token: bool) -> Tensor:
        """Add the exchange's part `added` [B*T, (1+)N, D] to the tokens [B*T, own tokens, width]."""
        added = self.back[number](added)
        first, patches = added[:, : int(class_token)], added[:, int(class_token) :]
        patches = patches.unflatten(1, self.grid).movedim(-1, 1)
        patches = F.interpolate(patches, self.own_grid, mode="nearest").flatten(2).transpose(1, 2)
        # Registers get nothing, nor does a class token outside of the exchange.
        beside = x.new_zeros(len(x), self.prefix - first.shape[1], x.shape[2])
        return x + torch.cat([first, beside, patches], 1)


class TwoViTs(nn.Module):
    """Clips [B, 3, T, H, W] -> logits [B, classes]. The spatial model gets frames, the temporal one their differences.

    Raises:
        ValueError: another kind of model, a size that its patches do not divide, or a spatial model without class
            token.
    """

    def __init__(self, spatial: Any, temporal: Any, frames: int, classes: int, dim: int, heads: int) -> None:
        super().__init__()
        roles = {"spatial": spatial, "temporal": temporal}
        for role, model in roles.items():
            if not isinstance(model, timm.models.VisionTransformer):
                raise ValueError(f"the {role} model is a {type(model).__name__}; {FITTING}")
        for role, model in roles.items():
            for pixels, side in zip(model.patch_embed.img_size, model.patch_embed.patch_size, strict=True):
                if pixels % side:
                    raise ValueError(
                        f"frames of {pixels} pixels are no whole number of the {role} model's patches of {side}: give "
                        "a multiple"
                    )
        if spatial.cls_token is None:
            raise ValueError(
                "the spatial model has no class token, which B-CAST takes in front of a frame's patches: make it the "
                "temporal model, or choose another"
            )
        rows, columns = map(min, spatial.patch_embed.grid_size, temporal.patch_embed.grid_size)
        grid, exchanges = (rows, columns), min(len(spatial.blocks), len(temporal.blocks))
        self.spatial, self.temporal = (Expert(model, exchanges, grid, dim) for model in (spatial, temporal))
        sizes: dict[str, Any] = {"dim": dim, "bottleneck_dim": dim // 2, "num_heads": heads}
        sizes |= {"num_frames": frames, "num_patches": grid[0] * grid[1]}
        self.exchanges = nn.ModuleList(BCAST(**sizes) for _ in range(exchanges))
        self.head = nn.Linear(spatial.embed_dim + temporal.embed_dim, classes)

    def forward(self, video: Tensor) -> Tensor:
        clips, frames = video.shape[0], video.shape[2]
        change = video - video.roll(1, 2)
        s = self.spatial.embed(video.transpose(1, 2).flatten(0, 1))
        t = self.temporal.embed(change.transpose(1, 2).flatten(0, 1))
        for number, exchange in enumerate(self.exchanges):
            s, t = self.spatial.run(number, s), self.temporal.run(number, t)
            given = self.spatial.to_exchange(number, s, True), self.temporal.to_exchange(number, t, False)
            # The exchange returns both streams including its additions; only the additions go back.
            taken = exchange(*(x.unflatten(0, (clips, frames)) for x in given))
            added = [after.flatten(0, 1) - before for after, before in zip(taken, given, strict=True)]
            s = self.spatial.from_exchange(number, s, added[0], True)
            t = self.temporal.from_exchange(number, t, added[1], False)
        pooled = (expert.model.norm(x).mean(1) for expert, x in ((self.spatial, s), (self.temporal, t)))
        return self.head(torch.cat([x.unflatten(0, (clips, frames)).mean(1) for x in pooled], -1))

    def use(self, backend: str) -> "TwoViTs":
        """Let the exchanges run in "auto", "eager", "cpu" or "triton"."""
        for exchange in self.exchanges:
            assert isinstance(exchange, BCAST)
            exchange.backend = backend
        return self


def make_clips(count: int, frames: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips [count, 3, frames, size, size] of a square over a still background, and their numbers in CLASSES."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=rng)
    video = torch.randn(count, 3, 1, size, size, generator=rng).mul(0.3).repeat(1, 1, frames, 1, 1)
    for clip, label in zip(video, labels.tolist(), strict=True):
        large, moves = divmod(label, 2)
        side, pace = size // (2 if large else 4), moves * size // 8
        row, column = torch.randint(size - side + 1, (2,), generator=rng).tolist()
        square = F.pad(torch.full((3, side, side), 2.0), (column, size - side - column, row, size - side - row))
        for number, frame in enumerate(clip.transpose(0, 1)):
            frame += square.roll(number * pace, 2)
    return video, labels


def create(role: str, name: str, size: int, pretrained: bool) -> Any:
    """A model of timm for frames of `size` x `size` pixels.

    Raises:
        ValueError: no such model, or one without the option `img_size`.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('vit_*') names those that there are")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
    except TypeError as error:
        raise ValueError(f"the {role} model {name!r} takes no size of frames; {FITTING}") from error
    except RuntimeError as error:  # weights of a name after the dot that timm does not know
        raise ValueError(f"the {role} model can't be made: {error}") from error


def build(spatial: str, temporal: str, frames: int, size: int, pretrained: bool = False) -> TwoViTs:
    """Both models of timm around exchanges as wide as the narrower of them.

    Raises:
        ValueError: no such model, or one that does not fit.
    """
    torch.manual_seed(0)
    one, other = create("spatial", spatial, size, pretrained), create("temporal", temporal, size, pretrained)
    dim = min(one.embed_dim, other.embed_dim)
    return TwoViTs(one, other, frames, len(CLASSES), dim, heads=max(dim // 64, 1))


def train(model: TwoViTs, steps: int, frames: int, size: int, batch: int = 8, lr: float = 1e-3) -> list[float]:
    """Train what is not frozen; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    device, losses = model.head.weight.device, []
    for step in range(steps):
        video, labels = make_clips(batch, frames, size, seed=step)
        loss = F.cross_entropy(model(video.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def difference(model: TwoViTs, video: Tensor) -> float:
    """How far fused and eager exchanges are apart: the largest difference of a logit over the largest logit."""
    fused, eager = model.use("auto")(video), model.use("eager")(video)
    model.use("auto")
    return float((fused - eager).abs().max() / eager.abs().max())


def main(words: list[str] | None = None) -> None:
    """Build, explain, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spatial", default="vit_small_patch16_224", help="a VisionTransformer of timm")
    parser.add_argument("--temporal", default="vit_tiny_patch16_224", help="another")
    parser.add_argument("--pretrained", action="store_true", help="let timm download the weights of these names")
    parser.add_argument("--size", type=int, default=64, help="of the frames in pixels (64)")
    parser.add_argument("--frames", type=int, default=8, help="of a clip, T of the exchange (8)")
    parser.add_argument("--steps", type=int, default=40, help="of the optimizer (40)")
    args = parser.parse_args(words)
    if min(args.size, args.frames, args.steps) < 1:
        parser.error("--size, --frames and --steps must be at least 1")
    try:
        model = build(args.spatial, args.temporal, args.frames, args.size, args.pretrained)
    except ValueError as error:
        parser.error(str(error))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    print(f"{len(model.exchanges)} exchanges; {frozen:,} parameters are frozen, {trained:,} train")
    print(f"each is a BCAST({model.exchanges[0].extra_repr()})")
    losses = train(model, args.steps, args.frames, args.size)
    tenth = max(len(losses) // 10, 1)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at first, {sum(losses[-tenth:]) / tenth:.3f} at last")
    video, _ = make_clips(4, args.frames, args.size, seed=-1)
    apart = difference(model, video.to(model.head.weight.device))
    print(f"fused and eager exchanges: their logits differ by {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
