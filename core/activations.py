"""What a classifier trained on the suspect set makes of its images; the ground of the cleansers that look at activations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from core import victim
from core.catalog import Inputs
from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.run import Run
from core.split import Cleansing


class Observing(Cleansing, victim.Training):
    """Parameters of every cleanser that needs a classifier trained on the set; a model given with the job is taken instead."""


def observer(run: Run, inputs: Inputs, params: Observing) -> Classifier:
    """Return the model that was given, or a classifier trained plainly on the suspect set."""
    assert inputs.suspect is not None
    if inputs.model is not None:
        return inputs.model.eval()
    run.phase("training")
    return victim.train(
        run, inputs.suspect, architecture=params.architecture, preprocessing=inputs.preprocessing, recipe=params.schedule(), name="observer"
    ).eval()


@torch.no_grad()
def collect(run: Run, function: Callable[[torch.Tensor], torch.Tensor], data: ImageSet, *, batch_size: int = 500) -> torch.Tensor:
    """Return `function` of float images in [0, 1] for all of `data`, in order, as one float32 tensor on the run's device."""
    found = []
    for chunk in data.images.split(batch_size):
        run.check_cancelled()
        found.append(function(as_floats(chunk.to(run.device))).float())
    return torch.cat(found)
