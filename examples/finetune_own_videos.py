"""Fine-tune CAST on a folder of your own videos, a subfolder for each class, and name the action in some of them.

    pip install -e '.[examples]'
    python examples/finetune_own_videos.py my-videos --cast cast_ek100.pth          # from a whole CAST
    python examples/finetune_own_videos.py my-videos --clip ViT-B-16.pt --videomae videomae.pth   # from the experts
    python examples/finetune_own_videos.py my-videos --cast cast_ek100.pth --balance optim.epochs=10 optim.lr=5e-4

    my-videos/jump/0001.mp4, my-videos/jump/0002.mov, my-videos/turn left/a.mp4, ...

This example is an open version of `cast train own-data`: the same recipe (recipes/own-data.yaml), settings, log,
checkpoints and `--resume`. Without --balance and --train-norms the weights have the same bits. Words such as
optim.epochs=10 change the recipe, as there. A setting that has an option here, such as out=X and --out X, may be given
once. HOOK marks the places for changes that settings can't make: the data, the model, the loss, the figures after an
epoch. Every fifth video of a class validates and never trains.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cast
from cast.predict import Failure
from cast.training import Engine
from cast.training.command import FREE, Validation, make_mix
from cast.training.distributed import on_main
from cast.training.models import blueprint, build, how_to_use, save_finished, whole_weights
from cast.training.recipes import load_recipe
from cast.training.session import Session
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample
from cast.video.datasets import open_dataset
from cast.video.folder import find_videos

#: Options of this example -> the same settings of the recipe; either may be given, not both.
OPTIONS = {"--cast": "experts.cast", "--clip": "experts.clip", "--videomae": "experts.videomae", "--out": "out"}
#: Settings from the folder of videos.
FROM_FOLDER = ("data.root", "data.train", "data.val")


def read_settings(overrides: list[str], options: Mapping[str, str | None]) -> TrainSettings:
    """The recipe with the command line's words and with the given OPTIONS.

    Raises:
        ValueError: a setting that is misspelt, given twice, or fixed by this example; or no weights for an expert.
    """
    words = {word.split("=", 1)[0] for word in overrides}
    if taken := sorted(words.intersection(FROM_FOLDER)):
        raise ValueError(
            f"{', '.join(taken)} can't be given: the folder VIDEOS is the root, and this example writes the lists; "
            "for lists of your own run: cast train own-data"
        )
    if twice := [f"{option} and {name}" for option, name in OPTIONS.items() if options[option] and name in words]:
        raise ValueError(f"{', '.join(twice)} are the same setting: give one of them")
    settings = load_recipe(TrainSettings, "own-data", *overrides)
    named: dict[str, Any] = {
        name.removeprefix("experts."): options[option] for option, name in OPTIONS.items() if options[option]
    }
    out = named.pop("out", settings.out if "out" in words else "runs/own-videos")
    experts = replace(settings.experts, **named)
    if experts.design == "cast" and not (experts.train or experts.cast or (experts.clip and experts.videomae)):
        raise ValueError(
            "the frozen experts need weights: name a whole CAST with --cast, or the files of both experts with --clip "
            "and --videomae; docs/training.md says where weights come from"
        )
    return replace(settings, experts=experts, out=str(out))


def list_videos(folder: Path, out: Path, every: int = 5) -> None:
    """Write OUT/train.csv and OUT/val.csv: each video's path below `folder`, and its subfolder's name as its class.

    Raises:
        ValueError: fewer than two classes, a class without videos, or no class with enough videos to validate.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(
            f"{folder} has {len(classes)} subfolders; there must be one for each class, at least two, with its videos"
        )
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for path in classes:
        for number, video in enumerate(find_videos(path).videos):
            split = "val" if number % every == every - 1 else "train"
            rows[split].append((str(video.relative_to(folder)), path.name))
    if not rows["val"]:
        raise ValueError(f"no class in {folder} has {every} videos; every {every}th one of a class validates")
    out.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        with open(out / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "action"), *lines])


def train_norms(model: nn.Module) -> None:
    """Let the frozen experts' LayerNorms train too: few parameters that adapt them to other pictures."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


class Balanced:
    """Cross-entropy with the same total weight for every class, however many videos it has.

    Args:
        samples: the training videos.
        classes: numbers of classes by head.
        smoothing: of targets that are single classes; mixup's are smoothed already.
    """

    def __init__(self, samples: list[Sample], classes: Mapping[str, int], smoothing: float) -> None:
        self.smoothing, self.weights = smoothing, dict[str, Tensor]()
        for head, count in classes.items():
            seen = Counter(sample.labels[head] for sample in samples)
            self.weights[head] = torch.tensor([len(samples) / (count * max(seen[c], 1)) for c in range(count)])

    def __call__(self, logits: Any, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and figures for the log."""
        losses, hits = [], {}
        for head, target in targets.items():
            soft, values = target.ndim == 2, logits[head].float()
            weights, smoothing = self.weights[head].to(values.device), 0.0 if soft else self.smoothing
            losses.append(F.cross_entropy(values, target, weights, label_smoothing=smoothing))
            if not soft:
                hits[head] = (values.argmax(1) == target).float().mean() * 100
        return torch.stack(losses).sum(), hits


def finetune(settings: TrainSettings, resume: bool = False, balance: bool = False, norms: bool = False) -> Path:
    """Train by a recipe; returns the directory of the finished model.

    Raises:
        ValueError, OSError: as `cast.training.command.fit`.
    """
    session = Session(settings, FREE, resume, "")
    accelerator, out = session.accelerator, session.out
    videos = open_dataset(settings.data)
    train, val = videos.samples("train"), videos.samples("val")
    # HOOK, data: `train` is a list of samples, paths with labels. Repeat, weigh or remove them.
    loader = session.loader(train)  # anything with `__len__` and `batches(epoch, start)` may replace it

    # HOOK, model: CAST with its weights, experts frozen. Set requires_grad, replace layers, wrap them with LoRA.
    model, notes = build(settings, videos.classes)
    if norms:
        train_norms(model)

    # HOOK, loss: the model's answer and the targets by head -> the loss, and figures for the log.
    mix = make_mix(settings, videos.classes)  # mixup, which makes soft targets
    smoothing = 0.0 if mix else settings.data.augment.smoothing
    counts = {head: len(names) for head, names in videos.classes.items()}
    criterion = Balanced(train, counts, smoothing) if balance else None  # None: cross-entropy

    plan = session.plan(loader, len(train), smoothing)
    make, use = blueprint(model), how_to_use(model, out / "model")
    engine = Engine(model, loader, plan, accelerator, session.checkpoints(model, train), mix, criterion)
    validation = Validation(settings, val, accelerator)

    def validate(unwrapped: nn.Module, epoch: int) -> dict[str, float]:
        # HOOK, after each epoch: the result is written to log.jsonl and to the screen.
        return {f"val {name}": value for name, value in validation(unwrapped).items()}

    def finish() -> str:
        tensors, how = whole_weights(engine.unwrapped), settings.data
        save = (make, tensors, videos.classes, how.sampling, out / "model", how.short_side)
        on_main(accelerator, lambda: save_finished(*save))
        return use

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = "\n".join([f"{len(train)} videos train, {len(val)} validate; {trained:,} parameters train", *notes])
    session.run(engine, note, validate, finish)
    return out / "model"


def main(words: list[str] | None = None) -> None:
    """Train, then predict some of the validation videos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="folder with a subfolder of videos for each class")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of recipes/own-data.yaml")
    parser.add_argument("--cast", help="a whole CAST to start from: a directory or a file of the authors")
    parser.add_argument("--clip", help="or CLIP's weights")
    parser.add_argument("--videomae", help="and VideoMAE's")
    parser.add_argument("--balance", action="store_true", help="let rare classes weigh as much as frequent ones")
    parser.add_argument("--train-norms", action="store_true", help="let the experts' LayerNorms train, too")
    parser.add_argument("--out", help="for lists, checkpoints and the model (runs/own-videos)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    args = parser.parse_intermixed_args(words)
    if not args.videos.is_dir():
        parser.error(f"{args.videos} is no folder; name one with a subfolder of videos for each class")
    try:
        settings = read_settings(args.overrides, {option: getattr(args, option[2:]) for option in OPTIONS})
        out = Path(settings.out)
        list_videos(args.videos, out)
        train, val = (str((out / f"{split}.csv").resolve()) for split in ("train", "val"))
        data = replace(settings.data, root=str(args.videos), train=train, val=val)
        settings = replace(settings, data=data)
        model = finetune(settings, args.resume, args.balance, args.train_norms)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")

    predictor = cast.Predictor(model, top=1)
    with open(out / "val.csv", newline="", encoding="utf-8") as file:
        some = list(csv.DictReader(file))[:8]
    for row, answer in zip(some, predictor.many(args.videos / row["path"] for row in some), strict=True):
        if isinstance(answer, Failure):
            print(answer.error)
        else:
            best = answer.guesses["action"][0]
            print(f"{row['path']}: {best.label} ({100 * best.probability:.0f} %), it is {row['action']}")


if __name__ == "__main__":
    main()
