"""The one training loop: epochs, schedule, mixed precision, progress, checkpoint, resume."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from core.augment import Augment, none
from core.errors import Diverged
from core.images import ImageSet, as_floats
from core.run import Run

Loss = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Schedule = Callable[[float], float]

# What processors call it: x86-64 (AVX-512, AMX), ARM64.
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def supervised(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Loss:
    """Return a loss of images and labels as one that `fit` takes, for data that has labels."""

    def checked(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return loss(images, labels)

    return checked


def mixed_precision(device: torch.device, *, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return bf16 autocast where the hardware multiplies bf16 natively, else a context that does nothing."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported()
    else:
        # oneDNN says yes wherever it can imitate bf16, with AVX-512 alone, at less than half of single precision's speed.
        capable = device.type == "cpu" and any(torch.cpu.get_capabilities().get(name, False) for name in NATIVE_BF16)
    if not (enabled and capable):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def batches(count: int, size: int, generator: torch.Generator, *, drop_last: bool = False) -> Iterator[torch.Tensor]:
    """Yield shuffled index tensors that cover 0..count-1 once; `drop_last` leaves a short last one out."""
    order = torch.randperm(count, generator=generator)
    if drop_last and count > size:
        order = order[: count - count % size]
    yield from order.split(size)


def steps(*marks: tuple[int, float]) -> Schedule:
    """Return a schedule from (first epoch, learning rate) marks: `steps((0, .1), (1, .01), (10, .001))`."""

    def rate(epoch: float) -> float:
        return [value for first, value in marks if first <= epoch][-1]

    return rate


def two_drops(rate: float, epochs: int, *, first: int = 1) -> Schedule:
    """Return MCLDef's schedule: `rate` for the `first` epochs, a tenth of it until half of all epochs, then a hundredth."""
    return steps((0, rate), (first, rate / 10), (max(epochs // 2, first + 1), rate / 100))


def one_cycle(epochs: int, peak: float, warm: float = 0.25) -> Schedule:
    """Return a linear rise to `peak` over the first share `warm` of training and a linear fall to zero after it."""

    def rate(epoch: float) -> float:
        done = epoch / epochs
        return peak * (done / warm if done < warm else max(1 - (done - warm) / (1 - warm), 0.0))

    return rate


def cosine(epochs: int, start: float) -> Schedule:
    """Return half a cosine from `start` to zero."""

    def rate(epoch: float) -> float:
        return start * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2

    return rate


def waves(start: float, turns: float) -> Schedule:
    """Return a cosine from `start` to zero and back, over and over, with `turns` half periods an epoch."""
    return lambda epoch: start * (1 + math.cos(math.pi * turns * epoch)) / 2


def warmed_cosine(epochs: int, rate: float, *, warm_from: float = 0.01, floor: float = 1e-3) -> Schedule:
    """Return SupContrast's schedule: half a cosine from `rate` to `rate * floor` by whole epochs, reached by a linear rise over the first ones.

    The rise takes ten epochs, or a tenth of a training that is shorter than a hundred.
    """
    warm = min(10.0, epochs / 10)

    def at(epoch: float) -> float:
        return rate * (floor + (1 - floor) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2)

    def schedule(epoch: float) -> float:
        if epoch < warm:
            return warm_from + (at(warm) - warm_from) * epoch / warm
        # Epochs count from 1 in its formula.
        return at(math.floor(epoch) + 1)

    return schedule


def fit(
    run: Run,
    name: str,
    *,
    data: ImageSet,
    loss: Loss,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epochs: int,
    batch_size: int,
    augment: Augment = none,
    prepare: Callable[[], object] = lambda: None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    mixed: bool = True,
    state: Mapping[str, Any] = MappingProxyType({}),
) -> list[float]:
    """Minimise `loss(images, labels)` over `data` as a resumable stage; return each epoch's mean loss.

    Args:
        name: the stage's name.
        data: images on the run's device; labels may be None.
        loss: receives float images in [0, 1] (after augmentation) and labels; returns a scalar.
        network: what the optimizer changes; its state is checkpointed.
        schedule: the learning rate at an epoch (fractions of an epoch within it).
        prepare: sets train and eval modes; called before each epoch.
        state: what else a step changes (the loss's own generator, say); checkpointed with the rest.
        after_epoch: called with the 1-based epoch, in whatever mode `prepare` set.

    Raises:
        Diverged: when the loss or a weight is no longer finite.
    """
    history: dict[str, list[float]] = {"loss": []}
    generator = run.generator(name)
    for epoch in run.stage(name, total=epochs, network=network, optimizer=optimizer, generator=generator, history=history, **state):
        prepare()
        mean = one_epoch(
            run, name, data=data, loss=loss, network=network, optimizer=optimizer, schedule=schedule, epoch=epoch, batch_size=batch_size,
            generator=generator, augment=augment, mixed=mixed,
        )  # fmt: skip
        history["loss"].append(mean)
        run.metric(f"{name} loss", mean, epoch=epoch + 1)
        after_epoch(epoch + 1)
    return history["loss"]


def one_epoch(
    run: Run,
    name: str,
    *,
    data: ImageSet,
    loss: Loss,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epoch: int,
    batch_size: int,
    generator: torch.Generator,
    augment: Augment = none,
    mixed: bool = True,
) -> float:
    """Go once through `data` and return the mean loss; for methods that alternate between losses. See `fit`."""
    total = torch.zeros((), device=run.device)
    seen = 0
    per_epoch = max(len(data) // batch_size, 1)
    # A handful of left-over images would make a tenth of the BatchNorm statistics that the epoch ends with.
    for index, chosen in enumerate(batches(len(data), batch_size, generator, drop_last=True)):
        for group in optimizer.param_groups:
            group["lr"] = schedule(epoch + index / per_epoch)
        # A set that is too large for the device stays where it is.
        here = chosen.to(data.images.device)
        images = as_floats(augment(data.images[here].to(run.device), generator))
        labels = None if data.labels is None else data.labels[here].to(run.device)
        with mixed_precision(run.device, enabled=mixed):
            value = loss(images, labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        total += value.detach() * len(chosen)
        seen += len(chosen)
    mean = float(total) / seen
    check(f"{name}, epoch {epoch + 1}", mean, network)
    return mean


def check(where: str, loss: float, network: nn.Module) -> None:
    """Raise `Diverged` when the loss or a weight is no longer finite."""
    if not (math.isfinite(loss) and finite(network)):
        raise Diverged(
            f"{where}: the loss or a weight became NaN or infinite", "Use a lower learning rate, or check that the images are what the model was trained on."
        )


def finite(network: nn.Module) -> bool:
    """Say whether every parameter and buffer is finite."""
    return all(bool(torch.isfinite(value).all()) for value in network.state_dict().values())
