"""The reference that speed is compared with: Neural Cleanse and MCLDef as plain loops, written from the papers' equations.

One label at a time, images through a DataLoader with a transform each, single precision, nothing shared between labels. They run where
the model is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from core.classifier import Classifier


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Uint8 images (N, C, H, W) as a data set with a transform an image."""

    def __init__(self, images: torch.Tensor, *, augment: bool) -> None:
        steps: list[Any] = [transforms.ToPILImage()]
        if augment:
            steps += [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self._images, self._transform = images, transforms.Compose([*steps, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._images[index]), 0


def neural_cleanse(model: Classifier, images: torch.Tensor, *, passes: int, batches: int, batch_size: int, threshold: float = 0.99) -> list[float]:
    """Invert one label after the other with the published schedule of the cost; return the smallest successful masks' norms.

    A pass is `batches` mini-batches. The cost starts at 0, is set to 1e-3 after five successful passes, doubled after five more and divided by
    2^1.5 after five failures; a label ends when it has moved both ways and 25 passes brought no smaller mask.
    """
    model, device = _reference(model), next(model.parameters()).device
    norms = []
    for label in range(model.classes):
        loader = DataLoader(Pictures(images, augment=False), batch_size=batch_size, shuffle=True)
        mask, pattern = (
            torch.atanh((torch.rand(*size, device=device) - 0.5) * (2 - 1e-4)).requires_grad_(True) for size in (images.shape[2:], images.shape[1:])
        )
        optimizer = torch.optim.Adam([mask, pattern], lr=0.1, betas=(0.5, 0.9))
        cost, best, set_, up, down, stale = 0.0, float("inf"), 0, 0, 0, 0
        raised = lowered = False
        for _ in range(passes):
            hits = seen = 0
            for index, x in enumerate(_placed(loader, device)):
                if index == batches:
                    break
                m, delta = torch.tanh(mask) / 2 + 0.5, torch.tanh(pattern) / 2 + 0.5
                logits = model((1 - m) * x + m * delta)
                loss = F.cross_entropy(logits, torch.full((len(x),), label, device=device)) + cost * m.abs().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                hits, seen = hits + int((logits.argmax(1) == label).sum()), seen + len(x)
            good, norm = hits / seen >= threshold, float((torch.tanh(mask) / 2 + 0.5).sum().detach())
            stale = 0 if good and norm < best else stale + 1
            best = min(best, norm) if good else best
            if best < float("inf") and raised and lowered and stale >= 25:
                break
            if cost == 0:
                set_ = set_ + 1 if good else 0
                if set_ >= 5:
                    cost, up, down, raised, lowered = 1e-3, 0, 0, False, False
            up, down = (up + 1, 0) if good else (0, down + 1)
            if up >= 5:
                up, cost, raised = 0, cost * 2, True
            elif down >= 5:
                down, cost, lowered = 0, cost / 2**1.5, True
        norms.append(best if best < float("inf") else norm)
    return norms


def mcldef(model: Classifier, images: torch.Tensor, *, target: int, inversion_epochs: int, epochs: int) -> tuple[Classifier, float]:
    """Run both stages of MCLDef as published; return the student and the mask's norm."""
    model, device = _reference(model), next(model.parameters()).device
    loader = DataLoader(Pictures(images, augment=True), batch_size=64, shuffle=True)
    mask, pattern = (torch.rand(*size, device=device).requires_grad_(True) for size in (images.shape[2:], images.shape[1:]))
    optimizer: torch.optim.Optimizer = torch.optim.Adam([mask, pattern], lr=0.005)
    for _ in range(inversion_epochs):
        for x in _placed(loader, device):
            loss = F.cross_entropy(model((1 - mask) * x + mask * pattern), torch.full((len(x),), target, device=device)) + 0.01 * mask.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
                pattern.clamp_(0, 1)
    mask, pattern = mask.detach(), pattern.detach()

    student = copy.deepcopy(model).requires_grad_(True)
    student.head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        student.train()
        optimizer.param_groups[0]["lr"] = 0.1 if epoch == 0 else 0.01 if epoch < epochs // 2 else 0.001
        for x in _placed(loader, device):
            stamped = (1 - mask) * x + mask * pattern
            with torch.no_grad():
                clean, poisoned = model.features(x), model.features(stamped)
            z = student.features(stamped)
            near, far = F.cosine_similarity(z, clean), F.cosine_similarity(z, poisoned)
            loss = F.cross_entropy(torch.stack([near, far], 1) / 0.5, torch.zeros(len(x), dtype=torch.int64, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student.eval(), float(mask.sum())


def _placed(loader: DataLoader[tuple[torch.Tensor, int]], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the loader's images on the device, without their labels."""
    for images, _ in loader:
        yield images.to(device)


def _reference(model: Classifier) -> Classifier:
    """Return a frozen copy in the memory layout that a checkpoint has when it is loaded without further thought."""
    return model.frozen_copy().to(memory_format=torch.contiguous_format)
