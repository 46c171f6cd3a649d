"""Trap-and-Replace: a reconstruction task keeps the stem honest, so that the backdoor settles in the head, which is thrown away."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.hooks import RemovableHandle

from core import training, victim
from core.augment import crop_and_flip
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.errors import BadDataset
from core.images import as_floats
from core.losses import total_variation
from core.run import Run
from core.schooling import Compared, plain

# What is trained first, where its stem ends, what replaces it, and what a plain training uses.
FORMS = {f"wrn-16-1-trap-{end}": (f"block{(end - 1) // 2 + 1}.{(end - 1) % 2}", f"wrn-16-1-replaced-{end}", "wrn-16-1-trap-plain") for end in (4, 5, 6)} | {
    f"resnet34-trap-{end}": (f"layer4.{(end - 29) // 2}", f"resnet34-replaced-{end}", "resnet34") for end in (29, 31, 33)
}


class TrapAndReplace(Compared, victim.Training):
    """Parameters; the defaults are the paper's for CIFAR-10."""

    method: Literal["trap_and_replace"]
    architecture: Literal[
        "wrn-16-1-trap-4", "wrn-16-1-trap-5", "wrn-16-1-trap-6", "resnet34-trap-29", "resnet34-trap-31", "resnet34-trap-33"
    ] = Field(default="wrn-16-1-trap-5", title="Architecture", description="The number is the convolution or block after which the stem ends.")  # fmt: skip
    recipe: Literal["trap-and-replace", "cpu", "mcldef", "mcldef-augmented", "dbr", "cbd"] = Field(
        default="trap-and-replace", title="Recipe", description="Of the first stage; `cpu` is what two cores finish."
    )
    reconstruction: float = Field(default=10.0, ge=0, le=1000, title="Reconstruction", description="lambda 1.")
    smoothness: float = Field(default=0.1, ge=0, le=1000, title="Smoothness", description="lambda 2, of the total variation; the published code has 1.")
    head_epochs: int = Field(default=200, ge=1, le=10_000, title="Epochs of the new head")
    head_rate: float = Field(default=1e-3, gt=0, le=1, title="Learning rate of the new head", description="A cosine to zero, with Adam.")
    head_batch: int = Field(default=32, ge=2, le=4096, title="Batch size of the new head")
    cutmix: float = Field(default=1.0, ge=0, le=1, title="CutMix", description="Share of the batches.")
    smoothing: float = Field(default=0.1, ge=0, lt=1, title="Label smoothing", description="Where CutMix is applied.")
    dropout: float = Field(default=0.5, ge=0, lt=1, title="Dropout", description="In the new head.")


@defense(
    title="Trap-and-Replace",
    paper="Wang et al., Trap and Replace: Defending Backdoor Attacks by Trapping Them into an Easy-to-Replace Subnetwork, NeurIPS 2022",
    needs=(Need.SUSPECT_DATASET, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="With a fifth of its epochs on CIFAR-10 it kept a smooth field and clean-label stripes out, small patches and a blended picture nearly (an ASR of 2 to 11 %); it let an l0 pattern (18 %), stripes on other classes' images (22 %) and label-consistent poison (45 %) in, and nearly all of what is noise from pixel to pixel: Trojan's square (87 %) and watermark (98 %), an l2 pattern (89 %; with all of its epochs 99.7 %); on small sets, with half of its epochs, blends, stripes, warps and patches stayed.",
)
def run(run: Run, inputs: Inputs, params: TrapAndReplace) -> Outcome:
    """Train stem, head and decoder on the suspect set, then a new head on the frozen stem with clean images."""
    suspect, clean = inputs.suspect, inputs.clean
    assert suspect is not None and clean is not None and suspect.labels is not None
    end, replaced, simple = FORMS[params.architecture]
    # A ResNet's bait is an ordinary one; the form with two heads comes after it.
    trap = victim.untrained(run, "trap", "resnet34" if "resnet34" in params.architecture else params.architecture, suspect, inputs.preprocessing)
    decoder = decoder_for(trap, end, clean.images[:1].float().to(run.device) / 255)
    both = nn.ModuleDict({"classifier": trap, "decoder": decoder}).to(run.device)
    caught: list[torch.Tensor] = []
    hook = trap.network.get_submodule(end).register_forward_hook(lambda module, given, made: caught.append(made))

    def bait(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = trap(images)
        drawn = decoder(caught.pop()).float()
        return F.cross_entropy(logits.float(), labels) + params.reconstruction * F.mse_loss(drawn, images) + params.smoothness * total_variation(drawn)

    recipe = params.schedule()
    run.phase("baiting and trapping")
    trapped = training.fit(
        run, "trap", data=suspect, loss=training.supervised(bait), network=both, optimizer=victim.optimizer(both, recipe), schedule=victim.rates(recipe),
        epochs=recipe.epochs, batch_size=min(recipe.batch_size, len(suspect)), augment=crop_and_flip(mirror=params.mirror), prepare=both.train,
    )  # fmt: skip
    both.eval()
    error = 0.0
    with torch.no_grad():
        for chunk in clean.images.split(100):
            images = as_floats(chunk.to(run.device))
            trap(images)
            error += float(F.mse_loss(decoder(caught.pop()).float(), images, reduction="sum")) / clean.images.numel()
    hook.remove()
    run.log(f"the stem's features rebuild images with a mean squared error of {error:.4f}", reconstruction_error=error)

    model = victim.untrained(run, "replace", replaced, suspect, inputs.preprocessing)
    stem = {name: value for name, value in trap.network.state_dict().items() if not name.startswith("decoder.")}
    model.network.load_state_dict({**model.network.state_dict(), **stem})
    fresh = [module for name, module in model.network.named_children() if name.endswith("_aux")]
    mixing = run.generator("replace", "mixing")

    def patch(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if float(torch.rand(1, generator=mixing)) >= params.cutmix:
            return F.cross_entropy(model(images).float(), labels)
        mixed, other, kept = cut_and_mix(images, mixing)
        logits = model(mixed).float()
        losses = [F.cross_entropy(logits, wanted, label_smoothing=params.smoothing) for wanted in (labels, labels[other.to(labels.device)])]
        return kept * losses[0] + (1 - kept) * losses[1]

    def modes() -> None:
        # The stem's BatchNorm must not learn the clean images' statistics: eval mode, not only no gradient.
        model.eval().requires_grad_(False)
        for module in fresh:
            module.train().requires_grad_(True)

    modes()
    hooks = add_dropout(model, params.dropout)
    run.phase("replacing the head")
    patched = training.fit(
        run, "replace", data=clean, loss=training.supervised(patch), network=model,
        optimizer=torch.optim.Adam([value for module in fresh for value in module.parameters()], lr=params.head_rate, weight_decay=5e-4),
        schedule=training.cosine(params.head_epochs, params.head_rate), epochs=params.head_epochs, batch_size=min(params.head_batch, len(clean)),
        augment=crop_and_flip(mirror=params.mirror), prepare=modes, after_epoch=lambda epoch: inputs.watch(model), state={"mixing": mixing},
    )  # fmt: skip
    for one in hooks:
        one.remove()
    model.eval().requires_grad_(True)
    baseline = plain(run, inputs, params, architecture=simple) if params.compare else None
    return Outcome(model=model, baseline=baseline, findings={"trap_loss": trapped, "reconstruction_error": error, "replace_loss": patched})


def decoder_for(trap: Classifier, end: str, image: torch.Tensor) -> nn.Module:
    """Return the reconstruction head on the output of module `end`: its own where the architecture has one, else five doublings of ResNet's map.

    Raises `BadDataset` when what it draws is not of the image's size.
    """
    maps: list[torch.Tensor] = []
    hook = trap.network.get_submodule(end).register_forward_hook(lambda module, given, made: maps.append(made))
    with torch.no_grad():
        trap.eval()(image)
    hook.remove()
    decoder = trap.network._modules.get("decoder") or _doubling(maps[0].shape[1], image.shape[1])
    assert isinstance(decoder, nn.Module)
    decoder = decoder.to(image.device)
    with torch.no_grad():
        drawn = decoder.eval()(maps[0])
    if drawn.shape != image.shape:
        advice = "Use images whose sides are multiples of 4, or of 32 for a ResNet."
        raise BadDataset(f"images of {tuple(image.shape[2:])} cannot be rebuilt from {tuple(maps[0].shape[2:])}: that gives {tuple(drawn.shape[2:])}", advice)
    return decoder


def _doubling(width: int, channels: int) -> nn.Sequential:
    """Return the published decoder of ResNet-34's `layer4`: five transposed convolutions, normalised without parameters after every second."""

    def double(inside: int, outside: int) -> nn.Module:
        return nn.ConvTranspose2d(inside, outside, 4, 2, 1)

    return nn.Sequential(
        double(width, 256), double(256, 128), nn.InstanceNorm2d(128), nn.ReLU(), double(128, 64), double(64, 32), nn.InstanceNorm2d(32), nn.ReLU(),
        double(32, channels), nn.Sigmoid(),
    )  # fmt: skip


def cut_and_mix(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return CutMix's images (Yun et al., ICCV 2019), where the pasted box comes from (N,), and the share of pixels that were kept.

    One box a batch, of the area `1 - lambda`, lambda uniform in [0, 1]; the share is recomputed from the box as the border clips it.
    """
    height, width = images.shape[2:]
    share, middle = float(torch.rand(1, generator=generator)), torch.rand(2, generator=generator)
    ends = []
    for extent, at in zip((height, width), middle.tolist(), strict=True):
        half = int(extent * (1 - share) ** 0.5) // 2
        centre = int(at * extent)
        ends.append((max(centre - half, 0), min(centre + half, extent)))
    (top, bottom), (left, right) = ends
    other = torch.randperm(len(images), generator=generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[other.to(images.device), :, top:bottom, left:right]
    return mixed, other, 1 - (bottom - top) * (right - left) / (height * width)


def add_dropout(model: Classifier, rate: float) -> list[RemovableHandle]:
    """Drop values inside every residual block of the new head, between its two convolutions, and before the last pooling; return the hooks."""
    hooks: list[RemovableHandle] = []

    def drop(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (F.dropout(given[0], rate, training=module.training), *given[1:])

    for name, module in model.network.named_modules():
        if "_aux" in name and (name.endswith("conv2") or name == "bn1_aux"):
            hooks.append(module.register_forward_pre_hook(drop))
    if "layer4_aux" in model.network._modules:
        last = model.network.get_submodule("layer4_aux.2")
        hooks.append(last.register_forward_hook(lambda module, given, made: F.dropout(made, rate, training=module.training)))
    return hooks
