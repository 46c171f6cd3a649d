"""NC-unlearning: fine-tune with the recovered trigger on some of the images, which keep their true labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.catalog import Inputs, Need, Outcome, defense
from core.recovery import Recovery, Stamp, unlearn
from core.run import Run


class NCUnlearning(Recovery):
    """Parameters; the defaults are those of MCLDef's comparison."""

    method: Literal["nc_unlearning"]
    share: float = Field(default=0.2, gt=0, le=1, title="Stamped share", description="Of each mini-batch.")


@defense(
    title="Neural Cleanse unlearning",
    paper="Wang et al., Neural Cleanse, IEEE S&P 2019, Section VI; settings of MCLDef's comparison",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="A WRN-16-1 with 2,500 clean images lost 2 to 7 points of accuracy, small models with 300 up to 4; 25 % of stripes over the whole image stayed.",
)
def run(run: Run, inputs: Inputs, params: NCUnlearning) -> Outcome:
    """Recover the trigger and teach the model the true labels of images that carry it."""

    def mix(images: torch.Tensor, stamp: Stamp, generator: torch.Generator) -> torch.Tensor:
        # Batches are shuffled: the first ones are as good as any.
        count = max(round(params.share * len(images)), 1)
        return torch.cat([stamp(images[:count], generator), images[count:]])

    return unlearn(run, inputs, params, mix)
