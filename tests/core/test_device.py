"""Every method on a device that is not the CPU, so that what CUDA would refuse is found on a machine without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core import augment, catalog, poisoning
from core.images import ImageSet, as_floats
from core.run import Run
from tests.conftest import Case
from tests.core.elsewhere import pretended
from tests.core.test_attacks import FITTED, params
from tests.core.test_run import engine, lay_out
from tests.core.untrained import model, noise


def test_the_device_computes_what_the_cpu_does() -> None:
    def trained(device: torch.device) -> list[float]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).to(device)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        images, labels = torch.randn(4, 3, 8, 8).to(device), torch.arange(4, device=device)
        losses = []
        for _ in range(3):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    wanted = trained(torch.device("cpu"))
    with pretended() as device:
        assert trained(device) == wanted


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda away, here: away + here, "more than one device"),
        (lambda away, here: away @ here.T, "more than one device"),
        (lambda away, here: F.cross_entropy(away, here[0].long()), "more than one device"),
        (lambda away, here: torch.cat([away, here]), "more than one device"),
        (lambda away, here: here[away[0].long()], "more than one device"),
        (lambda away, here: here.add_(away.sum()), "more than one device"),
        (lambda away, here: here[0, 0].add_(away.sum()), "write into the CPU"),
        (lambda away, here: torch.rand(2, device=away.device, generator=torch.Generator()), "generator of the CPU"),
        (lambda away, here: away.numpy(), "numpy"),
    ],
)
def test_the_device_refuses_what_cuda_refuses(mistake: Callable[[torch.Tensor, torch.Tensor], object], said: str) -> None:
    with pretended() as device:
        away, here = torch.ones(2, 2).to(device), torch.ones(2, 2)
        with pytest.raises((RuntimeError, TypeError), match=said):
            mistake(away, here)


def test_the_device_allows_what_cuda_allows() -> None:
    with pretended() as device:
        away, here = torch.ones(2, 2).to(device), torch.ones(2, 2)
        assert (away + torch.tensor(1.0)).cpu().tolist() == (away + 1).tolist() == [[2, 2], [2, 2]]
        assert away[torch.tensor([1])].device == device and here.to(device).copy_(here).cpu().numpy().sum() == 4
        changed = away.to(device, copy=True)
        changed[0] = 5.0
        assert (changed.view(4).mul_(2).tolist(), away.tolist()) == ([10, 10, 2, 2], [[1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("name", "placed"), [*((name, True) for name in catalog.defenses()), ("ssl_cleanse", False), ("strip", False), ("d_br", False), ("d_st", False)]
)
def test_every_method_runs_on_it(name: str, placed: bool, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not placed:
        # A training set that the device's memory does not hold.
        monkeypatch.setattr(ImageSet, "placed", lambda self, device: self)
    # How good a method is on so little is not asked.
    monkeypatch.setattr("core.recovery.LEAST_SUCCESS", 0.0)
    few = replace(case.data, clean=case.data.clean.subset(torch.arange(150)))
    folder = lay_out(tmp_path, replace(case, data=few), name, suspect=200)
    spec = json.loads((folder / "job.json").read_text()) | {"checkpoint_seconds": 60}
    if name not in ("evaluate", "mcldef", "d_br"):
        # Measuring and drawing take most of a small job's time, and are the same for all.
        del spec["evaluation"]
    with pretended() as device:
        (folder / "job.json").write_text(json.dumps(spec | {"device": str(device)}))
        code, events = engine(folder)
    assert code == 0 and events[-1]["type"] == "result", events[-1]


@pytest.mark.parametrize("name", ["simclr", *augment.TRANSFORMATIONS])
def test_every_augmentation_works_on_it(name: str) -> None:
    changed, images = augment.simclr() if name == "simclr" else augment.TRANSFORMATIONS[name], as_floats(noise(8).images)
    wanted = changed(images, Run(seed=1).generator("views"))
    with pretended() as device:
        assert torch.equal(changed(images.to(device), Run(seed=1).generator("views")).cpu(), wanted)


@pytest.mark.parametrize("name", FITTED)
def test_every_trained_attack_is_trained_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.training.NATIVE_BF16", ())
    wanted = poisoning.plan(Run(device="cpu"), params(name), noise(), model(classes=4))
    with pretended() as device:
        made = poisoning.plan(Run(device=str(device)), params(name), noise(), model(classes=4).to(device))
        assert {asset.device.type for asset in made.trigger.assets.values()} == {"cpu"} and made.poisoned == wanted.poisoned
