"""What every architecture offers the methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Layers = Iterable[nn.Module]


class Network(nn.Module):
    """A classifier f = head ∘ features whose parts can be reached.

    `head` is the last linear layer. Inputs are normalised images (N, C, H, W).
    """

    head_name = "fc"

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of the residual groups, each (N, channels, height, width)."""
        raise NotImplementedError

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Turn the last stage's output into the feature vector (N, features)."""
        return last.mean((2, 3))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the last linear layer, (N, features)."""
        return self.pool(self.stages(images)[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes)."""
        return self.head(self.features(images))


class Convolutional(Network):
    """A network whose `features` are layers in a row, as torchvision builds them; its children keep their names.

    Args:
        whole: what torchvision's builder returned.
        head_name: where its last linear layer is.
    """

    def __init__(self, whole: nn.Module, head_name: str) -> None:
        super().__init__()
        self.head_name = head_name
        for name, module in whole.named_children():
            # `features` is the method here; the layers keep their key by being registered under it.
            self._modules[name] = module

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the last map of each resolution."""
        return maps_by_size(self._modules["features"].children(), images)  # type: ignore[union-attr]

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Average pool, and whatever lies between it and the last linear layer."""
        x = self.get_submodule("avgpool")(last) if "avgpool" in self._modules else last.mean((2, 3), keepdim=True)
        classifier = self._modules["classifier"]
        if isinstance(classifier, nn.Linear):
            return x.flatten(1)
        layers = list(classifier.children())[:-1]  # type: ignore[union-attr]
        for layer in layers:
            # ConvNeXt normalises before it flattens; the others' first layer is linear.
            x = layer(x) if isinstance(layer, nn.Flatten | nn.LayerNorm) else layer(x.flatten(1))
        return x.flatten(1)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Networks built within take no memory: their tensors have names and shapes, and no values."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with initial values.

    On the meta device nothing is filled, but the first random call there imports a symbolic algebra: half a second and 30 MB.
    """

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init" or function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def maps_by_size(layers: Layers, images: torch.Tensor) -> list[torch.Tensor]:
    """Run layers and return the last output of each spatial size, (N, channels, height, width) each."""
    maps: list[torch.Tensor] = []
    x = images
    for layer in layers:
        y = layer(x)
        if maps and y.shape[2:] == maps[-1].shape[2:]:
            maps.pop()
        maps.append(y)
        x = y
    return maps
