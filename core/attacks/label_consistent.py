"""CL: images of the target class, made hard to recognise by PGD, carry a patch; labels stay (Turner, Tsipras & Madry, 2019)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.adversarial import pgd
from core.attacks.badnets import PATTERNS
from core.catalog import Need, attack
from core.classifier import Classifier
from core.errors import BadRecipe
from core.images import ImageSet, as_floats
from core.poisoning import AttackParams, Labels, Sampling, labels_field, sampling_field
from core.run import Run
from core.triggers import Assets, Shape, add, replace

P = np.array(PATTERNS["grid"], dtype=np.uint8)
Q, R = P[:, ::-1], P[::-1, ::-1]
# (patch, rows from top or, negative, from bottom, columns likewise); -3 touches the border.
LAYOUTS = {
    "bottom_right": ((P, -3, -3),),
    "four_corners": ((Q, 0, 0), (P, 0, -3), (Q, -3, 0), (P, -3, -3)),
    "four_nad": ((R, 1, 1), (np.array(((255, 0, 255), (0, 255, 0), (0, 0, 255)), dtype=np.uint8), 1, -3), (Q, -3, 1), (P, -3, -3)),
    "four_same": ((P, 0, 0), (P, 0, -3), (P, -3, 0), (P, -3, -3)),
    "centre": ((R, 18, 18),),
    "top_left": ((P, 0, 0),),
}


class LabelConsistent(AttackParams):
    """Where the patches are, and how far PGD goes."""

    method: Literal["label_consistent"]
    labels: Labels = labels_field("clean")
    sampling: Sampling = sampling_field("S5")
    layout: Literal["bottom_right", "four_corners", "four_nad", "four_same", "centre", "top_left"] = Field(
        default="bottom_right",
        title="Patches",
        description="`bottom_right`: MCLDef; `four_corners`: symmetric, survives mirroring; `four_nad`: the FCT code; `four_same`: Trap-and-Replace; "
        "`centre`: MCLDef with augmentation; `top_left`: CBD.",
    )
    amplitude: float = Field(
        default=1, gt=0, le=1, title="Amplitude", description="1 replaces pixels; less adds 255 a on white cells and takes it from black ones."
    )
    epsilon: float = Field(default=8, gt=0, le=255, title="Epsilon", description="PGD's L-infinity bound, grey levels.")
    step: float = Field(default=1.5, gt=0, le=255, title="Step", description="PGD's step, grey levels.")
    steps: int = Field(default=100, ge=1, le=10_000, title="Steps", description="PGD's steps.")
    random_start: bool = Field(default=True, title="Random start", description="Whether PGD starts at a random point within epsilon.")


def assets(params: LabelConsistent, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) int16: the patches' grey levels, or what they add."""
    _, height, width = shape
    mask, pattern = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int16)
    for cells, row, column in LAYOUTS[params.layout]:
        top, left = row % height if row < 0 else row, column % width if column < 0 else column
        if top + 3 > height or left + 3 > width:
            raise BadRecipe(f"a patch of layout {params.layout} lies outside images of {height}x{width}", "Use another layout.")
        values = torch.from_numpy(cells.astype(np.int16))
        if params.amplitude < 1:
            values = torch.where(values > 0, 1, -1).to(torch.int16) * int(255 * params.amplitude)
        mask[:, top : top + 3, left : left + 3] = True
        pattern[:, top : top + 3, left : left + 3] = values
    return {"mask": mask, "pattern": pattern}


def fit(run: Run, params: LabelConsistent, assets: Assets, train: ImageSet, chosen: torch.Tensor, surrogate: Classifier) -> Assets:
    """Return the assets with `adversarial`, (n, C, H, W) uint8: the chosen images after untargeted PGD on the surrogate."""
    assert train.labels is not None
    model = surrogate.frozen_copy().to(run.device)
    adversarial = torch.zeros((len(chosen), *train.images.shape[1:]), dtype=torch.uint8)
    generator = run.generator("label-consistent")
    epsilon = params.epsilon / 255
    pieces = chosen.split(256)
    for index in run.stage("label-consistent", total=len(pieces), adversarial=adversarial, generator=generator):
        images = as_floats(train.images[pieces[index]].to(run.device))
        start = (torch.rand(images.shape, generator=generator) * 2 - 1).mul(epsilon).to(run.device) if params.random_start else None
        moved = pgd(model, images, train.labels[pieces[index]].to(run.device), epsilon=epsilon, step=params.step / 255, steps=params.steps, start=start)
        adversarial[index * 256 : index * 256 + len(moved)] = moved.mul(255).round().to(torch.uint8).cpu()
    return {**assets, "adversarial": adversarial}


def poison(images: torch.Tensor, params: LabelConsistent, assets: Assets, which: torch.Tensor) -> torch.Tensor:
    """Put the patches on the adversarial images."""
    return trigger(assets["adversarial"][which].to(images.device), params, assets)


@attack(
    title="Label-consistent",
    paper="Turner, Tsipras & Madry, Label-Consistent Backdoor Attacks, 2019",
    assets=assets,
    fit=fit,
    poison=poison,
    needs=(Need.MODEL,),
    fits_trigger=False,
)
def trigger(images: torch.Tensor, params: LabelConsistent, assets: Assets) -> torch.Tensor:
    """Put only the patches on: test images are not attacked otherwise."""
    if params.amplitude < 1:
        return add(images, assets["pattern"], "saturate")
    return replace(images, assets["mask"], assets["pattern"].to(torch.uint8))
