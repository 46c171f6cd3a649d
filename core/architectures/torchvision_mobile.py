"""MobileNetV2/V3, EfficientNet-B0/B3 and ConvNeXt-T as torchvision builds them, and with a finer stem for 32-pixel images.

Two of torchvision's forms differ from their CIFAR forms only in the stem's stride, which no checkpoint records: a forward
pass must tell them apart.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from core.architectures.network import Convolutional, only_shapes
from core.architectures.recognise import Architecture, Shapes

FAMILY = "torchvision_mobile"
# name: (torchvision's builder, where the head is)
MODELS = {
    "mobilenet-v2": ("mobilenet_v2", "classifier.1"),
    "mobilenet-v3-small": ("mobilenet_v3_small", "classifier.3"),
    "mobilenet-v3-large": ("mobilenet_v3_large", "classifier.3"),
    "efficientnet-b0": ("efficientnet_b0", "classifier.1"),
    "efficientnet-b3": ("efficientnet_b3", "classifier.1"),
    "convnext-tiny": ("convnext_tiny", "classifier.2"),
}
NAMES = {f"{model}{'-cifar' if fine else ''}": {"model": model, "fine": fine} for model in MODELS for fine in (False, True)}


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the networks whose tensors these are: the ImageNet and the CIFAR form where nothing but a stride differs."""
    stem = shapes.get("features.0.0.weight")
    if stem is None or len(stem) != 4:
        return []
    found = []
    for options in NAMES.values():
        last = shapes.get(f"{MODELS[str(options['model'])][1]}.weight")
        if last is None:
            continue
        known = _shapes(str(options["model"]), bool(options["fine"]))
        # Names must all agree; the head's and the stem's sizes are the checkpoint's own.
        same = set(known) == set(shapes) and all(known[name][0] == shapes[name][0] for name in known if name.startswith("features.") and shapes[name])
        if same and known["features.0.0.weight"][2:] == stem[2:]:
            found.append(describe(**options, classes=last[0], channels=stem[1]))  # type: ignore[arg-type]
    return found


def describe(*, model: str, fine: bool, classes: int, channels: int) -> Architecture:
    """Return the architecture of a model, with the fine stem or torchvision's."""
    return Architecture(
        family=FAMILY,
        name=f"{model}{'-cifar' if fine else ''}",
        options={"model": model, "fine": fine, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=32 if fine else 224,
    )


def build(options: dict[str, Any]) -> Convolutional:
    """Build the network that `variants` described."""
    from torchvision import models

    builder, head = MODELS[options["model"]]
    whole = getattr(models, builder)(num_classes=options["classes"])
    old = whole.features[0][0]
    if options["channels"] != 3 or options["fine"]:
        kernel, stride, padding = old.kernel_size, old.stride, old.padding
        if options["fine"]:
            # Half the stride: the patch of ConvNeXt shrinks with it, the others' 3x3 stays.
            stride = (stride[0] // 2, stride[1] // 2)
            kernel = stride if old.kernel_size == old.stride else kernel
        stem = nn.Conv2d(options["channels"], old.out_channels, kernel, stride, padding, bias=old.bias is not None)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out")
        whole.features[0][0] = stem
    return Convolutional(whole, head)


@functools.cache
def _shapes(model: str, fine: bool) -> dict[str, tuple[int, ...]]:
    with only_shapes():
        network = build({"model": model, "fine": fine, "classes": 10, "channels": 3})
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
