"""A small backdoored model on real images that ship with scikit-learn: victims for the demo and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from core import images, training
from core.architectures import wide_resnet
from core.attacks.badnets import BadNets, stamp
from core.images import ImageSet
from core.run import Run

SIZE = 16


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 16x16 grey: what the attacker trained on, what the user keeps clean, what is measured on."""

    train: ImageSet
    clean: ImageSet
    test: ImageSet


def load(seed: int = 0) -> Digits:
    """Return scikit-learn's 1,797 digits, split at random into 1,000 / 300 / 497."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = np.rint(found.images * (255 / 16)).astype(np.uint8)
    large = small.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)[..., None]
    data = images.from_arrays(large, found.target, tuple("0123456789"))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return Digits(*(data.subset(part) for part in order.split([1000, 300, len(data) - 1300])))


def poisoned(data: ImageSet, attack: BadNets, rate: float, seed: int = 0) -> ImageSet:
    """Stamp the trigger on a share of the images, drawn from all, and give them the target's label."""
    assert data.labels is not None
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: int(rate * len(data))]
    pixels, labels = data.images.clone(), data.labels.clone()
    pixels[chosen] = stamp(data.images[chosen], attack)
    labels[chosen] = attack.target
    return ImageSet(pixels, labels, data.class_names)


def victim(data: ImageSet, path: Path, *, seed: int = 0, epochs: int = 30) -> None:
    """Train a WRN-10-1 on the data and write its state dict as safetensors."""
    torch.manual_seed(seed)
    network = wide_resnet.WideResNet(depth=10, width=1, classes=10, channels=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def loss(batch: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(network(batch).float(), labels)

    training.fit(
        Run(seed=seed, device="cpu"), "victim", data=data, loss=loss, network=network, optimizer=optimizer,
        schedule=training.one_cycle(epochs, 0.1), epochs=epochs, batch_size=64, prepare=network.train,
    )  # fmt: skip
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


def npz(data: ImageSet, path: Path) -> Path:
    """Write a set as the .npz a user would upload."""
    assert data.labels is not None
    np.savez(path, images=data.images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy(), class_names=np.array(data.class_names))
    return path
