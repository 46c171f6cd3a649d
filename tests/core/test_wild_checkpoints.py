"""Checkpoints as people save them: taken in, recognised, rebuilt, and their outputs are the original's."""

from __future__ import annotations

import argparse
import collections
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core import architectures, weights
from core.classifier import Preprocessing
from intake import checkpoint

State = dict[str, torch.Tensor]
UNIT = Preprocessing((0.0,) * 3, (1.0,) * 3, "unit")


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    trained = [nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()][:3]
    found = torch.optim.Adam(trained, lr=1e-3)
    sum((value**2).sum() for value in trained).backward()  # type: ignore[union-attr]
    found.step()
    return found.state_dict()


# What surrounds the weights; each is written in the zip form, and the odd ones in the stream form too.
LAYOUTS: dict[str, Callable[[State], Any]] = {
    "a plain state dict": lambda state: state,
    "ordered, with metadata": lambda state: with_metadata(state),
    "state_dict and an epoch": lambda state: {"epoch": 12, "state_dict": state, "best_acc1": torch.tensor(93.1), "arch": "resnet"},
    "model, optimizer and arguments": lambda state: {"model": state, "optimizer": optimizer(state), "args": argparse.Namespace(lr=0.1, tags=["a"]), "epoch": 3},
    "net and an accuracy": lambda state: {"net": state, "acc": 93.02, "epoch": 199},
    "model_state_dict and a loss": lambda state: {"model_state_dict": state, "optimizer_state_dict": optimizer(state), "loss": np.float64(0.31)},
    "module. of DataParallel": prefixed("module."),
    "_orig_mod. of torch.compile": prefixed("_orig_mod."),
    "model. of a wrapper": prefixed("model."),
    "module. inside of state_dict": lambda state: {"state_dict": prefixed("module.")(state), "lr": 1e-4},
    "Lightning": lambda state: {
        "epoch": 5,
        "global_step": 1000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.")(state),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer(state)],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1, "name": "x"},
    },
    "parameters and not tensors": lambda state: {name: nn.Parameter(value, requires_grad=False) for name, value in state.items()},
    "views of one storage": lambda state: of_one_storage(state),
}
NAMES = (
    "wrn-10-1", "wrn-16-1", "resnet18-cifar", "resnet18-cifar-maxpool", "preactresnet18", "vgg11-bn-cifar", "vgg11-cifar-mlp", "densenet121-cifar",
    "mobilenet-v2-cifar", "mobilenet-v3-small-cifar", "efficientnet-b0-cifar", "vit-cifar", "wrn-16-1-replaced-5", "shufflenet-v2-x0-5", "mnasnet0-5",
)  # fmt: skip
CASES = [
    *((NAMES[number % len(NAMES)], layout, legacy) for number, (layout, legacy) in enumerate((one, old) for one in LAYOUTS for old in (False, True))),
    *((name, "a plain state dict", False) for name in NAMES),
]


def with_metadata(state: State) -> Any:
    found = collections.OrderedDict(state)
    found._metadata = collections.OrderedDict({"": {"version": 1}, "bn1": {"version": 2}})  # type: ignore[attr-defined]
    return found


def of_one_storage(state: State) -> State:
    floats = {name: value for name, value in state.items() if value.dtype == torch.float32}
    whole = torch.cat([value.flatten() for value in floats.values()])
    pieces = whole.split([value.numel() for value in floats.values()])
    return {**state, **{name: piece.view(value.shape) for (name, value), piece in zip(floats.items(), pieces, strict=True)}}


def original(name: str) -> tuple[architectures.Architecture, nn.Module, State]:
    torch.manual_seed(0)
    described = architectures.named(name, classes=10)
    network = described.build().eval()
    with torch.no_grad():
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return described, network, {described.theirs(key): value for key, value in network.state_dict().items()}


def rebuilt(data: bytes, name: str, tmp_path: Path) -> nn.Module:
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "out").mkdir()
    checkpoint.take_in(tmp_path / "file", tmp_path / "out")
    tensors = weights.read(tmp_path / "out" / "model.safetensors")
    found = [one.name for one in architectures.recognise({key: tuple(value.shape) for key, value in tensors.items()})]
    # Recognised, or one question with few answers.
    assert name in found and len(found) <= 3, found
    return weights.identify(tensors, None, architecture=name, preprocessing=UNIT)[0].eval()


@pytest.mark.parametrize(("name", "layout", "legacy"), CASES)
def test_a_checkpoint_from_the_wild_is_the_model_it_was(name: str, layout: str, legacy: bool, tmp_path: Path) -> None:
    described, network, state = original(name)
    out = io.BytesIO()
    torch.save(LAYOUTS[layout](state), out, _use_new_zipfile_serialization=not legacy)
    found = rebuilt(out.getvalue(), name, tmp_path)
    images = torch.rand(2, 3, min(described.input_size, 64), min(described.input_size, 64))
    with torch.no_grad():
        assert torch.allclose(found(images), network(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_other_precisions_are_taken_as_they_are(dtype: torch.dtype, container: str, tmp_path: Path) -> None:
    _, network, state = original("wrn-10-1")
    halves = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    if container == "torch":
        out = io.BytesIO()
        torch.save(halves, out)
        data = out.getvalue()
    else:
        save_file(halves, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
    found = rebuilt(data, "wrn-10-1", tmp_path)
    network.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in halves.items()}, strict=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(found(images), network(images), atol=1e-4, rtol=1e-4)


def test_there_are_enough_cases() -> None:
    assert len(set(CASES)) >= 40 and {name for name, _, _ in CASES} == set(NAMES)
