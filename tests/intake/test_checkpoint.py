"""What intake accepts is bit-equal to what torch would load; everything else is refused with a sentence."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.architectures.wide_resnet import WideResNet
from intake import checkpoint, door
from intake.refusal import Refusal


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "a.half": torch.randn(5).half(),
        "a.bf16": torch.randn(2, 2).bfloat16(),
        "b.long": torch.arange(6),
        "b.transposed": torch.randn(3, 5).t(),
        "b.slice": torch.randn(10)[2:7],
        "b.scalar": torch.tensor(7),
        "b.bool": torch.tensor([True, False]),
        "b.empty": torch.zeros(0, 3),
    }


def take(path: Path, tmp_path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    return checkpoint.take_in(path, folder), load_file(folder / "model.safetensors")


def saved(value: Any, path: Path, *, legacy: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net", "model_state_dict"])
def test_accepted_checkpoints_are_bit_equal_to_torch(tmp_path: Path, legacy: bool, wrapper: str | None) -> None:
    value: Any = collections.OrderedDict(state())
    if wrapper:
        momentum = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9).state_dict()
        value = {"epoch": 3, wrapper: value, "optimizer": momentum, "best": 0.5, "args": argparse.Namespace(lr=0.1), "score": np.float64(1.5)}
    path = saved(value, tmp_path / "checkpoint.pth.tar", legacy=legacy)
    described, found = take(path, tmp_path)
    assert described["container"] == ("legacy" if legacy else "zip")
    assert described["wrapper"] == (wrapper or "")
    assert set(found) == set(state())
    for name, tensor in state().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_plain_checkpoints_equal_the_oracle(tmp_path: Path) -> None:
    network = WideResNet(depth=10, width=1, classes=10)
    path = saved({"state_dict": torch.nn.DataParallel(network).state_dict()}, tmp_path / "x.pt", legacy=False)
    oracle = torch.load(path, weights_only=True)["state_dict"]
    _, found = take(path, tmp_path)
    assert set(found) == set(oracle) and all(torch.equal(found[name], oracle[name]) for name in oracle)


def test_safetensors_pass_through(tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in state().items()}
    save_file(tensors, tmp_path / "x.bin", metadata={"format": "pt"})
    _, found = take(tmp_path / "x.bin", tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def shards(tmp_path: Path, index: dict[str, str] | None = None, *, twice: bool = False) -> dict[str, bytes]:
    """A model in two safetensors files and their index, as Hugging Face lays them out."""
    tensors = {name: value.contiguous() for name, value in state().items()}
    names, files = sorted(tensors), {}
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[3 if twice else 4 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file, metadata={"format": "pt"})
        files[f"model/{file}"] = (tmp_path / file).read_bytes()
    found = {name: file for file, part in parts.items() for name in part}
    files["model/model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": found if index is None else index}).encode()
    return files


@pytest.mark.parametrize("container", ["zip", "tar.gz"])
def test_sharded_safetensors_are_one_model(tmp_path: Path, container: str) -> None:
    path = tmp_path / "model.bin"
    files = {**shards(tmp_path), "model/config.json": b"{}"}
    if container == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as out:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                out.addfile(entry, io.BytesIO(data))
    described, found = take(path, tmp_path)
    assert described["container"] == "sharded safetensors" and set(found) == set(state())
    assert all(torch.equal(found[name], value) for name, value in state().items())
    (tmp_path / "fenced").mkdir()
    assert door.examine("model", path, tmp_path / "fenced").ready


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"index": {}}, "damaged_file", "does not describe"),
        ({"index": {"a.weight": "elsewhere"}}, "damaged_file", "does not describe"),
        ({"twice": True}, "unsafe_file", "tensor b.bool is in"),
        ({"without": "index.json"}, "unsupported_format", "0 indices"),
        ({"without": "00002-of-00002.safetensors"}, "damaged_file", "does not describe"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], code: str, words: str) -> None:
    without = change.pop("without", None)
    files = {name: data for name, data in shards(tmp_path, **change).items() if not (without and name.endswith(without))}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal) as refusal:
        checkpoint.take_in(tmp_path / "x.zip", tmp_path / "out")
    assert refusal.value.code == code and words in refusal.value.message, refusal.value.message


def test_shared_storages_are_written_apart(tmp_path: Path) -> None:
    base = torch.randn(8)
    _, found = take(saved({"a": base[:4], "b": base[2:], "c": base}, tmp_path / "x.pt", legacy=False), tmp_path)
    assert torch.equal(found["a"], base[:4]) and torch.equal(found["b"], base[2:])


class Evil:
    """A payload that would only make a marker folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def rezip(path: Path, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as source:
        entries = [(info, source.read(info)) for info in source.infolist()]
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as out:
        for info, data in entries:
            out.writestr(info.filename, data)
    return path


def good(tmp_path: Path) -> Path:
    return saved({"a": torch.randn(4, 4)}, tmp_path / "good.pt", legacy=False)


def bad_files(tmp_path: Path) -> dict[str, tuple[Path, str, str]]:
    """Name → (file, code, words of the message)."""
    marker = tmp_path / "marker"

    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    whole = good(tmp_path).read_bytes()
    legacy = saved({"a": torch.randn(4, 4)}, tmp_path / "legacy.pt", legacy=True).read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"data/0") + 200] ^= 1
    tensors = io.BytesIO()
    save_file({"a": torch.zeros(2)}, tmp_path / "s.safetensors")
    tensors = bytearray((tmp_path / "s.safetensors").read_bytes())
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    stored = saved({"a": torch.randn(4, 4)}, tmp_path / "deflated.pt", legacy=False)
    twice = saved({"a": torch.randn(4, 4)}, tmp_path / "twice.pt", legacy=False)
    script = rezip(
        saved({"a": torch.randn(4, 4)}, tmp_path / "script.pt", legacy=False),
        lambda entries: entries.append((zipfile.ZipInfo(entries[0][0].filename.split("/")[0] + "/constants.pkl"), b"x")),
    )
    return {
        "empty": (write("empty", b""), "unsupported_format", "no checkpoint"),
        "text": (write("text", b"hello, I am a model" * 10), "unsupported_format", "no checkpoint"),
        "bare pickle": (write("pickle", pickle.dumps({"a": 1})), "unsupported_format", "bare pickle"),
        "keras": (write("k.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 100), "unsupported_format", "Keras"),
        "truncated zip": (write("cut.pt", whole[: len(whole) // 2]), "damaged_file", "cannot be read"),
        "truncated legacy": (write("cutl.pt", legacy[:-20]), "damaged_file", "cut short"),
        "trailing legacy": (write("trail.pt", legacy + b"x"), "damaged_file", "follow the last storage"),
        "prefixed zip": (write("prefixed.pt", b"PK\x03\x04" + b"\0" * 60 + whole), "unsafe_file", "precedes"),
        "flipped weight": (write("flipped.pt", bytes(flipped)), "damaged_file", "checksum"),
        "code in the pickle": (saved({"a": torch.zeros(1), "x": Evil(marker)}, tmp_path / "evil.pt", legacy=False), "unsafe_file", "posix.mkdir"),
        "code, legacy": (saved({"a": torch.zeros(1), "x": Evil(marker)}, tmp_path / "evill.pt", legacy=True), "unsafe_file", "import"),
        "whole model": (saved(torch.nn.Linear(1, 1), tmp_path / "whole.pt", legacy=False), "unsafe_file", "pickled model object"),
        "whole model, legacy": (saved(torch.nn.Linear(1, 1), tmp_path / "wholel.pt", legacy=True), "unsafe_file", "pickled model object"),
        "torchscript": (script, "unsupported_format", "TorchScript"),
        "expanded": (saved({"a": torch.zeros(1).expand(1 << 20)}, tmp_path / "e.pt", legacy=False), "unsafe_file", "expanded view"),
        "aliases": (saved({f"k{i}": v for i, v in enumerate([torch.zeros(1 << 18)] * 40)}, tmp_path / "al.pt", legacy=False), "unsafe_file", "would become"),
        "compressed": (rezip(stored, lambda entries: None, zipfile.ZIP_DEFLATED), "unsafe_file", "compressed"),
        "two pickles": (
            rezip(twice, lambda entries: entries.append((zipfile.ZipInfo(entries[0][0].filename.split("/")[0] + "/DATA.pkl"), b"x"))),
            "unsafe_file",
            "twice",
        ),
        "nan": (saved({"a": torch.tensor([float("nan")])}, tmp_path / "nan.pt", legacy=False), "weights_not_finite", "the first is a"),
        "infinite half": (saved({"a": torch.tensor([float("inf")]).half()}, tmp_path / "inf.pt", legacy=False), "weights_not_finite", "the first is a"),
        "infinite bf16": (saved({"a": torch.tensor([float("inf")]).bfloat16()}, tmp_path / "b.pt", legacy=False), "weights_not_finite", "the first is a"),
        "no tensors": (saved({"epoch": 3}, tmp_path / "none.pt", legacy=False), "unsupported_format", "no state dict"),
        "a list": (saved([torch.zeros(1)], tmp_path / "list.pt", legacy=False), "unsupported_format", "holds a list"),
        "hostile name": (saved({"<script>": torch.zeros(1)}, tmp_path / "name.pt", legacy=False), "unsafe_file", "is not allowed"),
        "safetensors cut": (write("cut.safetensors", bytes(tensors[:-1])), "damaged_file", "its header describes"),
        "safetensors longer": (write("long.safetensors", bytes(tensors) + b"x"), "damaged_file", "its header describes"),
        "safetensors twice": (write("dup.safetensors", len(header).to_bytes(8, "little") + header + b"\0" * 8), "damaged_file", "twice"),
        "safetensors huge": (write("huge.safetensors", (1 << 62).to_bytes(8, "little") + b"{" + b"\0" * 50), "unsupported_format", ""),
    }


def test_every_bad_file_is_refused_by_the_parser_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, (path, code, words) in bad_files(tmp_path).items():
        with pytest.raises(Refusal) as refusal:
            checkpoint.take_in(path, tmp_path / "out")
        assert refusal.value.code == code, (name, refusal.value.message)
        assert words in refusal.value.message, name
        assert refusal.value.advice, name
    assert not (tmp_path / "marker").exists()


def test_the_child_says_the_same_in_one_line(tmp_path: Path) -> None:
    for name, (path, code, _) in list(bad_files(tmp_path).items())[::4]:
        (tmp_path / "o" / name.replace(" ", "")).mkdir(parents=True)
        verdict = door.examine("model", path, tmp_path / "o" / name.replace(" ", ""))
        assert (verdict.ready, verdict.code) == (False, code), name
    (tmp_path / "fine").mkdir()
    verdict = door.examine("model", good(tmp_path), tmp_path / "fine")
    assert verdict.ready and {"rlimits", "no_new_privs"} <= set(verdict.fence)
    with safe_open(tmp_path / "fine" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["a"]
    assert json.dumps(verdict.description)
