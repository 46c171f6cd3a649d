"""VGG (Simonyan & Zisserman, ICLR 2015): torchvision's form, and two for CIFAR.

`cifar` has one linear layer on 512 features (kuangliu), `cifar-mlp` three (huyvnphan); torchvision's first linear layer reads 25088.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from core.architectures.network import Convolutional
from core.architectures.recognise import Architecture, Shapes

FAMILY = "vgg"
LETTERS = {11: "A", 13: "B", 16: "D", 19: "E"}
FORMS = {"imagenet": "", "cifar": "-cifar", "cifar-mlp": "-cifar-mlp"}
NAMES = {
    f"vgg{depth}{'-bn' if norm else ''}{suffix}": {"depth": depth, "norm": norm, "form": form}
    for depth in LETTERS
    for norm in (False, True)
    for form, suffix in FORMS.items()
}


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the VGG these shapes belong to, if they do."""
    convolutions = [name for name, shape in shapes.items() if name.startswith("features.") and len(shape) == 4]
    stem = shapes.get("features.0.weight")
    if stem is None or len(stem) != 4 or stem[0] != 64 or any(not name.startswith(("features.", "classifier.")) for name in shapes):
        return []
    depth = {8: 11, 10: 13, 13: 16, 16: 19}.get(len(convolutions))
    last = shapes.get("classifier.weight", shapes.get("classifier.6.weight"))
    if depth is None or last is None or any(len(name.split(".")) != 3 for name in shapes if name.startswith("features.")):
        return []
    first = shapes.get("classifier.0.weight")
    form = "cifar" if first is None else "cifar-mlp" if first[1] == 512 else "imagenet"
    return [describe(depth=depth, norm="features.1.running_mean" in shapes, form=form, classes=last[0], channels=stem[1])]


def describe(*, depth: int, norm: bool, form: str, classes: int, channels: int) -> Architecture:
    """Return the architecture of a depth, with or without BatchNorm, in a form."""
    return Architecture(
        family=FAMILY,
        name=f"vgg{depth}{'-bn' if norm else ''}{FORMS[form]}",
        options={"depth": depth, "norm": norm, "form": form, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=224 if form == "imagenet" else 32,
    )


def build(options: dict[str, Any]) -> Convolutional:
    """Build the network that `variants` described."""
    from torchvision.models import vgg

    whole = vgg.VGG(vgg.make_layers(vgg.cfgs[LETTERS[options["depth"]]], batch_norm=options["norm"]), num_classes=options["classes"], init_weights=False)
    if options["channels"] != 3:
        whole.features[0] = nn.Conv2d(options["channels"], 64, 3, 1, 1)
    if options["form"] != "imagenet":
        whole.avgpool = nn.AdaptiveAvgPool2d(1)
    if options["form"] == "cifar-mlp":
        whole.classifier[0] = nn.Linear(512, 4096)
    if options["form"] == "cifar":
        whole.classifier = nn.Linear(512, options["classes"])
    for module in whole.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return Convolutional(whole, "classifier" if options["form"] == "cifar" else "classifier.6")
