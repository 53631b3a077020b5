"""The training loop, from micro-batches to optimizer steps to epochs, for any number of processes.

The inputs of a step depend only on (seed, epoch, position). The model's random numbers are seeded anew for each
micro-batch. So a checkpoint needs no state of a generator. A run that was killed and resumed gives the same bits as an
uninterrupted one, on the same machine with the same numbers of threads and processes. On a GPU this needs deterministic
operators of PyTorch, see `cast.training.determinism`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cast.ground.graphs import Graphs
from cast.ground.transfer import Ahead, to_device
from cast.training.checkpoints import Checkpoints
from cast.training.ema import Average
from cast.training.figures import Figures, Outcome
from cast.training.groups import parameter_groups
from cast.training.progress import DivergenceError, Progress, Step
from cast.training.tensors import full


class MicroBatch(Protocol):
    """Clips of one forward pass: `video` [B, 3, T, S, S], `labels` int64 [B] by head, `names` [B] of the files."""

    @property
    def video(self) -> Tensor: ...
    @property
    def labels(self) -> Mapping[str, Tensor]: ...
    @property
    def names(self) -> list[str]: ...
    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch on another device, after its remaining augmentation."""
        ...


class Source(Protocol):
    """A source of micro-batches, such as `cast.video.loader.ClipLoader`."""

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The epoch's micro-batches from number `start` on; equal in every call."""
        ...


#: (the model's answer, targets by head) -> the loss, and figures to log.
Criterion = Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

#: (video, labels, seed) -> video and targets by head: classes int64 [B], or shares of the classes [B, classes].
Mix = Callable[[Tensor, Mapping[str, Tensor], int], tuple[Tensor, dict[str, Tensor]]]

#: A micro-batch with its number in the training.
_Numbered = tuple[int, MicroBatch]
#: Name of the video among a micro-batch's tensors. No head has an empty name.
_VIDEO = ""


@dataclass(frozen=True)
class Plan:
    """The numbers of one training that the loop needs.

    Args:
        epochs: passes over the data.
        steps_per_epoch: optimizer steps of one pass.
        accumulate: micro-batches of a step, of each process.
        micro_batch: clips of a micro-batch.
        rate: step, counted from 0 -> learning rate, before layer-wise decay.
        weight_decay, layer_decay: see :func:`cast.training.groups.parameter_groups`.
        smoothing: label smoothing of targets that are single classes.
        clip_grad: greatest length of the gradient; None leaves it as it is.
        ema: share of the old average that stays after a step; None for no average.
        betas: of AdamW.
        seed: of all random numbers inside the model.
        checkpoint_every: optimizer steps between checkpoints; 0 writes one at the end of each epoch only.
        graphs: whether forward and backward of a micro-batch are replayed as a CUDA graph; for one process on a GPU.
    """

    epochs: int
    steps_per_epoch: int
    accumulate: int
    micro_batch: int
    rate: Callable[[int], float]
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    smoothing: float = 0.0
    clip_grad: float | None = None
    ema: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    checkpoint_every: int = 0
    graphs: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch


class Engine:
    """Trains a model in place.

    Args:
        model: from a batch of videos to logits by head; parameters without gradients stay frozen.
        source: the data; a head without labels, or labels without a head, is an error.
        plan: the numbers of the training.
        accelerator: of the training, with the plan's `accumulate`.
        checkpoints: directory of states; the newest is loaded before the first step.
        mix: mixes the clips of a micro-batch and makes soft targets; None for no mixing.
        criterion: computes the loss; if None the sum of the heads' cross-entropies.
    """

    source: Source
    plan: Plan
    accelerator: Any
    checkpoints: Checkpoints
    mix: Mix | None
    model: Any
    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        plan: Plan,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        mix: Mix | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        self.source, self.plan, self.mix = source, plan, mix
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.criterion: Criterion = criterion or classification(plan.smoothing)
        deepspeed = accelerator.distributed_type == "DEEPSPEED"
        if deepspeed and plan.ema is not None:
            raise ValueError("ema is not possible under DeepSpeed, which hides the fp32 weights: use DDP or FSDP2")
        groups = parameter_groups(model, plan.weight_decay, plan.layer_decay)
        # eps as published. The fused AdamW runs few kernels, and can skip a step without waiting for the host.
        optimizer = torch.optim.AdamW(groups, lr=plan.rate(0), betas=plan.betas, eps=1e-8, fused=True)
        optimizer.register_step_pre_hook(self._leave_if_bad)
        # A failed training may have left gradients in this model. `zero_grad` of the prepared optimizer might not
        # remove them.
        optimizer.zero_grad(set_to_none=True)
        self._bad: Tensor | None = None
        self._steps_in_backward = deepspeed
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped: nn.Module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.average: Average | None = Average(self.unwrapped, plan.ema) if plan.ema is not None else None
        self._replayed = Graphs(self._whole, accelerator.device, self._gradients) if plan.graphs else None
        checkpoints.attach(self.model, self.optimizer, self.average)
        self.progress: Progress = checkpoints.load() or Progress()
        self.accelerator.step = 0  # each step starts a new accumulation, also after an error

    def run(
        self,
        on_step: Callable[[Progress, Step], None] = lambda progress, step: None,
        on_epoch: Callable[[nn.Module], dict[str, float]] = lambda model: {},
        on_entry: Callable[[Progress, dict[str, float]], None] = lambda progress, entry: None,
    ) -> Progress:
        """Train to the end of the plan.

        Args:
            on_step: called after each step, on every process.
            on_epoch: called after each epoch on every process, with the model in evaluation mode; it must not change
                the model. Its result joins the epoch's history. The epoch's checkpoint is written before it. So if it
                raises or is killed, the next run calls it again and repeats no step.
            on_entry: called next, on every process, with the epoch's entry of the history. If it raises, the next run
                repeats both calls.

        Returns:
            The progress; its `history` has, per epoch, `epoch`, `loss`, accuracy by head, and what `on_epoch` returned.

        Raises:
            DivergenceError: the loss or the gradient is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        if self._epoch_is_due:
            self._end_epoch(on_epoch, on_entry)
        while self.progress.step < self.plan.steps:
            self._run_steps(on_step)
            self._end_epoch(on_epoch, on_entry)
        self.unwrapped.eval()
        return self.progress

    @property
    def epoch(self) -> int:
        """Number of epochs whose steps are done."""
        return self.progress.step // self.plan.steps_per_epoch

    def _run_steps(self, on_step: Callable[[Progress, Step], None]) -> None:
        """Run the remaining steps of an epoch."""
        position = self.progress.step % self.plan.steps_per_epoch
        batches = self.source.batches(self.epoch, position * self.plan.accumulate)
        ends = (self.progress.step, (self.epoch + 1) * self.plan.steps_per_epoch)
        numbered = zip(range(*(step * self.plan.accumulate for step in ends)), batches, strict=False)
        ahead = Ahead(numbered, self._prepare, self.accelerator.device)
        try:
            for _ in range(position, self.plan.steps_per_epoch):
                self._advance(ahead, on_step)
        finally:
            close = getattr(batches, "close", None)  # if it is a generator, this ends its workers
            if close is not None:
                close()

    def _advance(self, batches: Ahead[_Numbered], on_step: Callable[[Progress, Step], None]) -> None:
        """One optimizer step, and a checkpoint if one is due after it."""
        progress = self.progress
        began = time.perf_counter()
        report = self._step(batches, began)
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in report.figures.items()}
        on_step(progress, report)
        if self._epoch_is_due or (self.plan.checkpoint_every and progress.step % self.plan.checkpoint_every == 0):
            self.checkpoints.save(progress)

    @property
    def _epoch_is_due(self) -> bool:
        """Whether an epoch's steps are done but not its end: its sums are not in the history yet."""
        return self.progress.step % self.plan.steps_per_epoch == 0 and bool(self.progress.sums)

    def _end_epoch(
        self,
        on_epoch: Callable[[nn.Module], dict[str, float]],
        on_entry: Callable[[Progress, dict[str, float]], None],
    ) -> None:
        """Close an epoch. Its checkpoint is already written, so a validation that raises loses no training."""
        progress = self.progress
        means = {name: total / self.plan.steps_per_epoch for name, total in progress.sums.items()}
        self.model.eval()
        entry = {"epoch": self.epoch, **means, **on_epoch(self.unwrapped)}
        on_entry(progress, entry)
        progress.history.append(entry)
        progress.sums = {}
        self.checkpoints.update(progress)

    def _step(self, batches: Ahead[_Numbered], began: float) -> Step:
        """Launch a whole step, then start the next micro-batch, and only then wait for the device."""
        plan, accelerator, number = self.plan, self.accelerator, self.progress.step
        lr = plan.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.model.train()
        figures, names = Figures(), []
        for (index, batch), tensors in islice(batches, plan.accumulate):
            names.append(batch.names)
            with accelerator.accumulate(self.model):
                self._compute(index, tensors, figures, names)
        if len(names) < plan.accumulate:
            raise ValueError(
                f"the data ended after {len(names)} of {plan.accumulate} micro-batches of step {number}: it promised "
                f"{len(self.source)} an epoch"
            )
        length = self._gradient_length()
        self._bad = figures.judge(accelerator, length)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._replayed is None)  # a graph adds to the gradients of its recording
        batches.start()
        outcome = figures.read()
        self._check(outcome, names, figures)
        if self.average is not None and not outcome.bad:
            self.average.update()
        clips = sum(map(len, names)) * accelerator.num_processes
        return Step(outcome.values, lr, outcome.length, clips, time.perf_counter() - began, outcome.bad)

    def _compute(self, index: int, tensors: Mapping[str, Tensor], figures: Figures, names: list[list[str]]) -> None:
        """Forward and backward of one micro-batch."""
        if self._replayed is not None:
            figures.add(self._replayed(tensors, self._seed(index)))
            return
        torch.manual_seed(self._seed(index))
        loss, found = self._forward(tensors)
        figures.add(found)
        if self._steps_in_backward and self.accelerator.sync_gradients:
            figures.judge(self.accelerator, None)
            self._check(figures.read(), names, figures)
        self.accelerator.backward(loss)

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward in the form that a graph records."""
        loss, found = self._forward(tensors)
        self.accelerator.backward(loss)
        return found

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.unwrapped.parameters() if p.grad is not None]

    def _forward(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the figures to log."""
        targets = {name: tensor for name, tensor in tensors.items() if name != _VIDEO}
        with self.accelerator.autocast():
            answers = self.model(tensors[_VIDEO])
        loss, extra = self.criterion(answers, targets)
        return loss, {"loss": loss.detach(), **extra}

    def _prepare(self, numbered: _Numbered) -> dict[str, Tensor]:
        """A micro-batch on the device, augmented and mixed: the video under `_VIDEO`, and the targets by head."""
        index, batch = numbered
        device = self.accelerator.device
        ready = batch.to(device)
        video, targets = ready.video, ready.labels
        if self.mix is not None:
            video, targets = self.mix(video, batch.labels, self._seed(index))
        return {_VIDEO: video} | {name: to_device(target, device) for name, target in targets.items()}

    def _seed(self, index: int) -> int:
        return micro_seed(self.plan.seed, index, self.accelerator.process_index)

    def _gradient_length(self) -> Tensor | None:
        """Length of the gradient, on the device; clips the gradient if the plan says so."""
        accelerator, limit = self.accelerator, self.plan.clip_grad
        if self._steps_in_backward:  # DeepSpeed has clipped already
            length = self.model.get_global_grad_norm()
            return None if length is None else torch.as_tensor(length, device=accelerator.device)
        if limit is not None:
            length = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        else:
            accelerator.unscale_gradients()
            length = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return full(length)

    def _leave_if_bad(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step that was not finite, make the fused AdamW keep weights and moments, without a wait."""
        if self._bad is not None:
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # includes the flag that fp16's scaler has set

    def _check(self, outcome: Outcome, names: list[list[str]], figures: Figures) -> None:
        """Raise DivergenceError if the step was not finite. The weights are still those before it."""
        if not outcome.bad:
            return
        loss = outcome.values["loss"]
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss}", names, figures.broken())
        # The scalers of fp16 and of DeepSpeed skip such steps by design.
        if self.accelerator.scaler is None and not self._steps_in_backward:
            what = f"the loss is finite, but the gradient's length is {outcome.length}"
            self._diverged(what, names, [True] * len(names))

    def _diverged(self, what: str, names: list[list[str]], broken: list[bool]) -> None:
        own = [name for group, bad in zip(names, broken, strict=True) if bad for name in group]
        videos = list(dict.fromkeys(gather_object(own)))
        number, plan = self.progress.step, self.plan
        shown = ", ".join(videos[:12]) + (f" and {len(videos) - 12} more" if len(videos) > 12 else "")
        raise DivergenceError(
            f"training diverged at step {number}: {what}. The step's clips: {shown}. Its weights were not touched, and "
            f"the last checkpoint is whole. Try a lower learning rate (now {plan.rate(number):.3g}), a longer warm-up, "
            f"clipped gradients (clip_grad, now {plan.clip_grad}), bf16 or fp32; and check these files",
            number,
            videos,
        )


def classification(smoothing: float) -> Criterion:
    """Cross-entropy summed over the heads, and each head's accuracy in percent if targets are single classes.

    Args:
        smoothing: of targets that are single classes; soft ones are smoothed already.
    """

    def criterion(logits: Any, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if logits.keys() != targets.keys():
            raise ValueError(
                f"the model has heads {sorted(logits)}, the data labels {sorted(targets)}; they must agree"
            )
        losses = [_cross_entropy(logits[name], target, smoothing) for name, target in targets.items()]
        hits = {
            name: (logits[name].argmax(1) == target).float().mean() * 100
            for name, target in targets.items()
            if target.ndim == 1
        }
        return torch.stack(losses).sum(), hits

    return criterion


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean over the clips, at least in fp32. Soft targets are smoothed already."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, label_smoothing=smoothing if target.ndim == 1 else 0.0)


def micro_seed(seed: int, index: int, rank: int) -> int:
    """A seed for one micro-batch of one process: below 2^63, far from its neighbours'."""
    return int(np.random.SeedSequence((seed, index, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
