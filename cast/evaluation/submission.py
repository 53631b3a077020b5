"""The submission file of EPIC-Kitchens-100's action recognition challenge.

Format 0.2 as in the organisers' C1-Action-Recognition repository and on the challenge's page: a zip with `test.json`,
`{"version", "challenge", "sls_pt", "sls_tl", "sls_td", "results": {narration_id: {"verb": {"0": score, ...}, "noun":
{...}, "action": {"verb,noun": score}}}}`. `action` is optional. Without it the server multiplies the softmax of both
scores. So the scores here are logarithms of the probabilities: their softmax are the probabilities again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import torch
from torch import Tensor

from cast.evaluation.predictions import Predictions
from cast.ground.files import write_bytes
from cast.metrics import top_pairs

#: Classes of EPIC-Kitchens-100.
CLASSES = {"verb": 97, "noun": 300}
#: The number of pairs that the server requires under `action`.
ACTIONS = 100


def submission(predictions: Predictions, levels: Sequence[int]) -> dict[str, Any]:
    """The content of `test.json`.

    Args:
        predictions: of a model with EPIC-Kitchens-100's heads; videos are named `<narration_id>.mp4`.
        levels: supervision of the model, 0 to 5 each: pre-training, training labels, training data
            (https://github.com/epic-kitchens/sls).

    Raises:
        ValueError: other heads, levels that don't exist, or two videos with one narration_id.
    """
    found = {head: values.shape[1] for head, values in predictions.probabilities.items()}
    if found != CLASSES:
        raise ValueError(f"the model's heads are {found}; EPIC-Kitchens-100's submission needs {CLASSES}")
    if len(levels) != 3 or not all(0 <= level <= 5 for level in levels):
        raise ValueError(
            f"the supervision levels are {list(levels)}; they must be three from 0 to 5: pre-training, training "
            "labels, training data (https://github.com/epic-kitchens/sls)"
        )
    narrations = [Path(video).stem for video in predictions.videos]
    if len(set(narrations)) != len(narrations):
        twice = next(name for name in narrations if narrations.count(name) > 1)
        raise ValueError(f"several videos are called {twice!r}; a submission needs one <narration_id>.mp4 each")
    verb, noun = predictions.probabilities["verb"], predictions.probabilities["noun"]
    scores, pairs = top_pairs(verb.double(), noun.double(), ACTIONS)
    return {
        "version": "0.2",
        "challenge": "action_recognition",
        **dict(zip(("sls_pt", "sls_tl", "sls_td"), levels, strict=True)),
        "results": {
            narration: {
                "verb": _scores(verb[row]),
                "noun": _scores(noun[row]),
                "action": {
                    f"{v},{n}": score for (v, n), score in zip(pairs[row].tolist(), scores[row].tolist(), strict=True)
                },
            }
            for row, narration in enumerate(narrations)
        },
    }


def write_submission(path: str | os.PathLike[str], predictions: Predictions, levels: Sequence[int]) -> None:
    """Write the zip file to upload; equal predictions give equal bytes. Errors as in :func:`submission`."""
    content = json.dumps(submission(predictions, levels))
    file = io.BytesIO()
    with ZipFile(file, "w") as archive:
        archive.writestr(ZipInfo("test.json"), content, compress_type=ZIP_DEFLATED)
    write_bytes(Path(path), file.getvalue())


def _scores(probabilities: Tensor) -> dict[str, float]:
    # The smallest normal float32 replaces an underflow to 0, because JSON has no logarithm of 0.
    smallest = torch.finfo(torch.float32).tiny
    logs = probabilities.double().clamp_min(smallest).log()
    return {str(index): score for index, score in enumerate(logs.tolist())}
