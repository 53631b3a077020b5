"""Faults in what training and prediction do for a GPU: waits, copies, graphs, precision."""

from __future__ import annotations

from faults.base import fault

ENGINE, GRAPHS, TRANSFER = "cast/training/engine.py", "cast/ground/graphs.py", "cast/ground/transfer.py"
WAITS, STEPS, REPLAYS = "tests/test_training_waits.py", "tests/test_training_steps.py", "tests/test_graphs.py"

FAULTS = [
    fault("the loss looked at between forward and backward", WAITS,
          (ENGINE, "        figures.add(found)\n", "        figures.add(found)\n        bool(loss.isfinite())\n")),
    fault("the step's figures read before the optimizer", WAITS,
          (ENGINE, "        self.optimizer.step()\n", "        figures.read()\n        self.optimizer.step()\n")),
    fault("the next batch begun after the wait", WAITS,
          (ENGINE, "        batches.start()\n        outcome = figures.read()\n",
           "        outcome = figures.read()\n        batches.start()\n")),
    fault("labels mixed on the GPU", WAITS,
          (ENGINE, "self.mix(video, batch.labels,", "self.mix(video, ready.labels,")),
    fault("copies that wait", WAITS, (TRANSFER, "non_blocking=True", "non_blocking=False")),
    fault("the computing stream does not wait for copies", WAITS,
          (TRANSFER, "            current.wait_stream(self._stream)\n", "")),
    fault("masks copied to the GPU in a way that waits", WAITS,
          ("cast/pretrain/masking.py", "to_device((times + chosen.sort(1).values[:, None]).flatten(1), device)",
           "(times + chosen.sort(1).values[:, None]).flatten(1).to(device)")),
    fault("a step that is not finite is taken", STEPS,
          (ENGINE, "        if self._bad is not None:\n", "        if False:\n")),
    fault("the average follows a skipped step", STEPS,
          (ENGINE, "self.average is not None and not outcome.bad", "self.average is not None")),
    fault("gradients of a failed micro-batch stay", "tests/test_training_engine.py -k starts_without_gradients",
          (ENGINE, "        optimizer.zero_grad(set_to_none=True)\n", "")),
    fault("an error of the loader raised a step early", "tests/test_transfer.py",
          (TRANSFER, "except Exception as error:", "except StopIteration as error:")),
    fault("FSDP2 adds gradients in the products' precision", STEPS,
          ("cast/training/distributed.py", "        _shard(accelerator.state.fsdp_plugin)\n", "        pass\n")),
    fault("a replay on the arguments of the recording", REPLAYS,
          (GRAPHS, "buffer.copy_(inputs[name], non_blocking=True)", "pass")),
    fault("a replay without its seed", REPLAYS,
          (GRAPHS, "            torch.manual_seed(seed)\n", "            pass\n")),
    fault("results that the next replay overwrites", REPLAYS,
          (GRAPHS, "{name: buffer.clone() for", "{name: buffer for")),
    fault("warming up adds to the gradients", REPLAYS, (GRAPHS, "            x.copy_(copy)\n", "            pass\n")),
    fault("gradients lose the memory that a graph adds to", REPLAYS,
          (ENGINE, "set_to_none=self._replayed is None", "set_to_none=True")),
    fault("recordings outlive their weights", REPLAYS,
          (GRAPHS, "self._met, self._recordings, self._at = set(), {}, at", "self._at = at")),
    fault("every shape recorded", REPLAYS, (GRAPHS, " and len(self._recordings) < MOST", "")),
    fault("deterministic training without cuBLAS's workspaces", "tests/test_training_session.py",
          ("cast/training/session.py", "            ask_cublas()\n", "            pass\n")),
    fault("the GPU's program with other weights", "tests/test_export.py -k gpu",
          ("cast/export.py", "{name: own[name] for name in traced.state_dict}",
           "{name: torch.zeros_like(own[name]) for name in traced.state_dict}")),
]  # fmt: skip
