"""Train a CAST, in one short file: data, model, optimizer, loop, evaluation, checkpoint.

    pip install -e '.[examples]'
    python examples/minimal_train.py             # about a minute on a CPU
    python examples/minimal_train.py --resume    # after a kill: goes on from the last checkpoint, to the same weights
    python examples/minimal_train.py --sizes published --clip ViT-B-16.pt --videomae videomae.pth   # for a GPU

The data are generated: a handwritten digit (scikit-learn has 1,797 scans) moves left, right, up or down over noise. The
noun is the digit; the verb is its direction, which no single frame shows. The evaluation uses other scans than the
training. For your own clips, replace `make_clips`; for videos there is `cast train` (docs/training.md).
"""

import argparse
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import cast
from cast.training import cosine, parameter_groups

# All sizes. "small" is ours, found by trial. "published" is the paper's Table 4 for EPIC-KITCHENS-100 with a batch for
# one GPU instead of 384: the learning rate is 1e-3 for 256 clips.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"image_size": 32, "patch_size": 8, "num_frames": 8, "embed_dim": 64, "depth": 3, "num_heads": 4},
        "batch": 16, "lr": 2e-3, "weight_decay": 0.05, "layer_decay": 1.0, "warmup": 20, "smoothing": 0.0,
    },
    "published": {
        "model": {"drop_path": 0.2},  # the rest are cast.CASTConfig's defaults: CAST-B/16, 16 frames of 224 x 224
        "batch": 6, "lr": 1e-3 * 6 / 256, "weight_decay": 0.05, "layer_decay": 0.75, "warmup": 500, "smoothing": 0.1,
    },
}  # fmt: skip
VERBS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
DIGITS = load_digits()
SCANS, NOUNS = torch.tensor(DIGITS.images / 16).float(), torch.tensor(DIGITS.target)
TRAINING, EVALUATION = range(1300), range(1300, len(SCANS))  # scans of each


def make_clips(scans: range, count: int, config: cast.CASTConfig, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips float32 [count, 3, frames, size, size], pixels from -1 to 3, and int64 labels [count] by head."""
    rng, frames, size = torch.Generator().manual_seed(seed), config.num_frames, config.image_size
    which = torch.randint(scans.start, scans.stop, (count,), generator=rng)
    verb = torch.randint(len(VERBS), (count,), generator=rng)
    course = torch.tensor(list(VERBS.values()))[verb][:, None] * torch.linspace(-0.3, 0.3, frames)[:, None]
    middle = course + 0.4 * torch.rand(count, 1, 2, generator=rng) - 0.2  # of the digit; the frame goes from -1 to 1
    zoom = 1.8  # width of the frame in digits
    affine = torch.cat([zoom * torch.eye(2).expand(count, frames, 2, 2), -zoom * middle[..., None]], -1).flatten(0, 1)
    grid = F.affine_grid(affine, [count * frames, 1, size, size], align_corners=False)
    drawn = F.grid_sample(SCANS[which].repeat_interleave(frames, 0)[:, None], grid, align_corners=False)
    noise = torch.rand(count, 3, frames, size, size, generator=rng)
    return 3 * drawn.view(count, 1, frames, size, size) + noise - 1, {"verb": verb, "noun": NOUNS[which]}


@torch.inference_mode()
def evaluate(model: cast.CAST, batch: int, batches: int = 20) -> dict[str, float]:
    """Accuracy in percent by head."""
    model.eval()
    device, hits = next(model.parameters()).device, dict.fromkeys(model.config.classes, 0)
    for number in range(batches):
        video, labels = make_clips(EVALUATION, batch, model.config, seed=10**9 + number)
        for head, logits in model(video.to(device)).items():
            hits[head] += int((logits.argmax(1).cpu() == labels[head]).sum())
    model.train()
    return {head: 100 * count / (batch * batches) for head, count in hits.items()}


def shown(accuracy: dict[str, float]) -> str:
    """The accuracies as a sentence."""
    return "scans that it never saw: " + ", ".join(f"{head} {percent:.1f} %" for head, percent in accuracy.items())


def read_checkpoint(path: Path, begun: str, device: str) -> dict[str, Any]:
    """The state of a training that was begun with the same options.

    Raises:
        ValueError: it was begun with others, or the file is damaged or no checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        was = state["begun"]
    except (OSError, EOFError, UnpicklingError, RuntimeError, LookupError, TypeError) as error:
        what = f"{path} is no whole checkpoint of this example ({error!r:.200})"
        raise ValueError(f"{what}; delete it and leave --resume out") from error
    if was != begun:
        raise ValueError(f"{path} was begun {was}, not {begun}; resume it that way, or name another --out")
    return state


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train by the command line's words; returns the last evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=400, help="of the optimizer (400)")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints (100)")
    parser.add_argument("--clip", help="CLIP's weights; without both files the experts start from nothing and train")
    parser.add_argument("--videomae", help="VideoMAE's weights")
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="for checkpoint and model")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt, with the same --steps")
    args = parser.parse_args(words)
    sizes, checkpoint = SIZES[args.sizes], args.out / "checkpoint.pt"
    begun = f"with --sizes {args.sizes} {'and' if args.clip else 'without'} --clip"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if min(args.steps, args.every) < 1 or bool(args.clip) != bool(args.videomae):
        parser.error("--steps and --every must be at least 1, and --clip and --videomae come together")
    if args.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no {checkpoint}; leave --resume out, or name its directory with --out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # fails now, and not after hours of training
    except OSError as error:
        parser.error(f"--out: {args.out} takes no files ({error}); name another directory")

    torch.manual_seed(0)
    try:
        state = read_checkpoint(checkpoint, begun, device) if args.resume else None
        model = cast.CAST(heads={"verb": len(VERBS), "noun": 10}, fused=True, **sizes["model"]).train()
        if args.clip:
            model.load_experts(args.clip, args.videomae)  # frozen: adapters, exchange, last norms, heads train
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not args.clip:
        model.requires_grad_(True)
        for name, weight in model.named_parameters():  # CAST's own deviation, 0.02, is for a width of 768
            if weight.ndim > 1 and name.endswith("weight") and weight.any():  # weights that are zero must start at zero
                torch.nn.init.xavier_uniform_(weight.detach().flatten(1))
    model.to(device)
    groups = parameter_groups(model, sizes["weight_decay"], sizes["layer_decay"])  # each with its lr_scale
    optimizer = torch.optim.AdamW(groups, lr=sizes["lr"], betas=(0.9, 0.999), eps=1e-8)
    rate = cosine(sizes["lr"], 0.0, min(sizes["warmup"], args.steps), args.steps)
    first, accuracy = 0, dict[str, float]()
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["steps"]
        if first >= args.steps:
            accuracy = evaluate(model, sizes["batch"])
            print(f"already at step {first} of {args.steps}; {shown(accuracy)}")

    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_scale"]
        torch.manual_seed(step)  # seeds drop path, so that a resumed training draws the same
        video, labels = make_clips(TRAINING, sizes["batch"], model.config, seed=step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(video.to(device))
        loss = torch.stack([
            F.cross_entropy(logits[head].float(), label.to(device), label_smoothing=sizes["smoothing"])
            for head, label in labels.items()
        ]).sum()  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            accuracy = evaluate(model, sizes["batch"])
            print(f"step {step + 1}: loss {loss.item():.3f}; {shown(accuracy)}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}
            state["begun"] = begun
            torch.save(state, args.out / "checkpoint.part")
            (args.out / "checkpoint.part").replace(checkpoint)  # a kill leaves the old one or the new one

    model.labels = {"verb": list(VERBS), "noun": [str(digit) for digit in range(10)]}
    model.save_pretrained(args.out / "model")  # cast.CAST.from_pretrained and `cast predict --checkpoint` load it
    return accuracy


if __name__ == "__main__":
    main()
