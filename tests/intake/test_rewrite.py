from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from core.images import ImageSet
from intake import dataset, door, pickled
from intake.rewrite import rewrite
from tests.intake.test_dataset import FLAT, FOLDERS, LAYOUTS, PIXELS, PNG, RNG, ROWS, archive, batches, npz, parquet, picture, tar

LABELLED = [name for name, (_, classes) in LAYOUTS.items() if classes in ([], ["cat", "dog"])]


def taken(path: Path, folder: Path) -> tuple[dict[str, Any], ImageSet]:
    folder.mkdir()
    return dataset.take_in(path, folder), ImageSet.load(folder)


def judged(folder: Path, actions: dict[int, str], labels: list[int], new: dict[int, int]) -> None:
    """Write a manifest as the engine does."""
    names = json.loads((folder / "dataset.json").read_text())["names"]
    with (folder / "manifest.jsonl").open("w") as out:
        for index, given in enumerate(labels):
            line = {
                "index": index, "name": names[index] if names else str(index), "action": actions.get(index, "kept"), "given": given,
                "label": new.get(index, given), "score": 0.5, "reason": "",
            }  # fmt: skip
            out.write(json.dumps(line) + "\n")


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LABELLED)
def test_every_layout_comes_back_in_its_own_form(tmp_path: Path, name: str) -> None:
    make, classes = LAYOUTS[name]
    upload = make(tmp_path / "upload.bin")
    described, _ = taken(upload, tmp_path / "before")
    judged(tmp_path / "before", {1: "relabelled", 2: "dropped"}, [0, 0, 1, 1], {1: 1})
    # Through the fenced child, as the worker does.
    verdict = door.examine("rewrite", upload, tmp_path / "before")
    assert verdict.ready, verdict
    assert verdict.description["images"] == 3
    again, found = taken(tmp_path / "before" / verdict.description["file"], tmp_path / "after")
    assert again["layout"] == described["layout"] and again["class_names"] == described["class_names"] == classes
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), np.stack([PIXELS[0], PIXELS[1], PIXELS[3]]))
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1]
    lines = manifest(tmp_path / "before")
    assert [line["action"] for line in lines] == ["kept", "relabelled", "dropped", "kept"]
    assert [line["label"] for line in lines] == (["cat", "dog", "dog", "dog"] if classes else [0, 1, 1, 1])
    assert [line["path"] is None for line in lines] == [False, False, True, False]
    if described["layout"] in ("class_folders", "csv", "webdataset"):
        # The manifest says where each kept image is now.
        assert [line["path"] for line in lines if line["path"]] == list(found.names)


def contents(path: Path) -> dict[str, bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as found:
            return {name: found.read(name) for name in found.namelist()}
    with tarfile.open(path) as packed:
        return {entry.name: packed.extractfile(entry).read() for entry in packed}  # type: ignore[union-attr]


def test_kept_files_are_the_same_bytes_and_nothing_else_comes_along(tmp_path: Path) -> None:
    upload = archive(
        tmp_path / "x.zip", {**FOLDERS, "cat/broken.png": b"no picture", "dog/c2.png": picture(), "run.sh": b"rm -rf /", "classes.txt": b"cat\ndog"}
    )
    described, _ = taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {1: "relabelled", 3: "dropped"}, [0, 0, 1, 1, 1], {1: 1})
    made = rewrite(upload, tmp_path / "out")
    files = contents(tmp_path / "out" / made["file"])
    # A file of that name is there already: the one that moves says where it came from.
    assert set(files) == {"classes.txt", "cat/c1.png", "dog/c2.png", "dog/c2-from-cat.png", "dog/d2.png"}
    assert files["cat/c1.png"] == PNG[0] and files["dog/c2-from-cat.png"] == PNG[1] and files["dog/d2.png"] == PNG[3]
    lines = manifest(tmp_path / "out")
    assert [line["path"] for line in lines] == ["cat/c1.png", "dog/c2-from-cat.png", "dog/c2.png", None, "dog/d2.png", None]
    assert lines[-1]["name"] == "cat/broken.png" and lines[-1]["action"] == "dropped" and "cannot be read" in lines[-1]["reason"]
    assert len(lines) == described["count"] + len(described["unreadable"])
    # The same again is the same file.
    judged(tmp_path / "out", {1: "relabelled", 3: "dropped"}, [0, 0, 1, 1, 1], {1: 1})
    first = (tmp_path / "out" / made["file"]).read_bytes()
    assert (tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"]).read_bytes() == first


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.zst"])
def test_an_archive_stays_what_it_was(tmp_path: Path, kind: str) -> None:
    names = {"zip": "zip of class folders", "tar": "tar", "tar.gz": "tar.gz", "tar.zst": "tar.zst"}
    upload = LAYOUTS[names[kind]][0](tmp_path / "upload.bin")
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {}, [0, 0, 1, 1], {})
    made = rewrite(upload, tmp_path / "out")
    assert made == {"file": f"cleansed.{kind}", "images": 4}
    assert (tmp_path / "out" / made["file"]).read_bytes()[:2] == upload.read_bytes()[:2]


def test_a_table_keeps_its_other_columns(tmp_path: Path) -> None:
    table = "name,colour,label\n" + "".join(f'{name},"a, b",{label}\n' for name, label in ROWS) + "gone.png,red,cat\n"
    upload = archive(tmp_path / "x.zip", {**FLAT, "gone.png": b"no picture", "labels.csv": table.encode()})
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {0: "dropped", 1: "relabelled"}, [0, 0, 1, 1], {1: 1})
    files = contents(tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"])
    assert files["labels.csv"].decode() == 'name,colour,label\nc2.png,"a, b",dog\nd1.png,"a, b",dog\nd2.png,"a, b",dog\n'


def test_arrays_keep_their_shape_type_and_neighbours(tmp_path: Path) -> None:
    upload = npz(
        tmp_path / "x.npz", x=np.stack(PIXELS).transpose(0, 3, 1, 2), y=np.array([0, 0, 1, 1], dtype=np.uint8), boxes=np.arange(8.0).reshape(4, 2),
        class_names=np.array(["cat", "dog"]),
    )  # fmt: skip
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {0: "dropped", 1: "relabelled"}, [0, 0, 1, 1], {1: 1})
    with np.load(tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"]) as found:
        assert found["x"].shape == (3, 3, 8, 9) and np.array_equal(found["x"], np.stack(PIXELS[1:]).transpose(0, 3, 1, 2))
        assert found["y"].dtype == np.uint8 and found["y"].tolist() == [1, 1, 1]
        assert found["boxes"].tolist() == [[2, 3], [4, 5], [6, 7]] and found["class_names"].tolist() == ["cat", "dog"]


def test_as_many_class_names_as_images_stay_class_names(tmp_path: Path) -> None:
    upload = npz(tmp_path / "x.npz", images=np.stack(PIXELS), labels=np.array([0, 1, 2, 3]), class_names=np.array(list("abcd")))
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {0: "dropped"}, [0, 1, 2, 3], {})
    with np.load(tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"]) as found:
        assert found["class_names"].tolist() == list("abcd") and found["labels"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("number", [0, -1, 127, 128, 255, -129, 2**31, -(2**40), 10**30])
def test_numbers_are_pickled_whatever_their_size(number: int) -> None:
    assert pickle.loads(pickled.batch({"n": number, "l": [number, "x", b"y"]})) == {b"n": number, b"l": [number, "x", b"y"]}
    with pytest.raises(TypeError, match="float"):
        pickled.batch({"n": 0.5})


def test_cifar_batches_come_back_as_batches(tmp_path: Path) -> None:
    pixels, labels = RNG.integers(0, 256, (6, 3072), dtype=np.uint8), [3, 1, 0, 2, 2, 1]

    def batch(part: slice) -> bytes:
        rows = range(6)[part]
        return pickle.dumps(
            {b"data": pixels[part], b"labels": labels[part], b"filenames": [f"{n}.png".encode() for n in rows], b"batch_label": b"x"}, protocol=2
        )

    meta = pickle.dumps({"label_names": list("abcd")}, protocol=2)
    upload = batches(tmp_path / "c.tar.gz", batch(slice(0, 4)), data_batch_2=batch(slice(4, 6)), test_batch=batch(slice(0, 2)), **{"batches.meta": meta})
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {1: "dropped", 4: "relabelled"}, labels, {4: 0})
    made = rewrite(upload, tmp_path / "out")
    _, found = taken(tmp_path / "out" / made["file"], tmp_path / "again")
    assert np.array_equal(found.images.reshape(5, 3072).numpy(), pixels[[0, 2, 3, 4, 5]])
    assert found.labels is not None and found.labels.tolist() == [3, 0, 2, 0, 1]
    assert found.names == ("data_batch_1/0.png", "data_batch_1/2.png", "data_batch_1/3.png", "data_batch_2/4.png", "data_batch_2/5.png")
    first = next(data for name, data in contents(tmp_path / "out" / made["file"]).items() if name.endswith("data_batch_1"))
    opened = pickle.loads(first)
    assert opened[b"labels"] == [3, 0, 2] and opened[b"batch_label"] == b"x" and opened[b"data"].dtype == np.uint8


def test_parquet_keeps_columns_and_metadata_and_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": d, "path": None} for d in (PNG[0], b"no picture", *PNG[1:])], "label": [0, 0, 0, 1, 1], "extra": list("abcde")}
    upload = parquet(tmp_path / "x.parquet", columns, ["cat", "dog"])
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {0: "dropped", 1: "relabelled"}, [0, 0, 1, 1], {1: 1})
    made = tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"]
    table = pyarrow.parquet.read_table(made)
    assert table.column("extra").to_pylist() == ["c", "d", "e"] and table.column("label").to_pylist() == [1, 1, 1]
    assert table.schema.metadata == pyarrow.parquet.read_schema(upload).metadata
    assert [row["bytes"] for row in table.column("image").to_pylist()] == PNG[1:]


def test_a_large_class_folder_opens_as_an_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    upload = tar(tmp_path / "x.tar", {f"data/{name}": data for name, data in FOLDERS.items()})
    taken(upload, tmp_path / "out")
    judged(tmp_path / "out", {1: "relabelled", 2: "dropped"}, [0, 0, 1, 1], {1: 1})
    for name, data in contents(tmp_path / "out" / rewrite(upload, tmp_path / "out")["file"]).items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    opened = ImageFolder(str(tmp_path / "tree" / "data"))
    assert opened.classes == ["cat", "dog"]
    lines = {line["path"]: line["label"] for line in manifest(tmp_path / "out") if line["path"]}
    assert {str(Path(path).relative_to(tmp_path / "tree")): opened.classes[label] for path, label in opened.samples} == lines
    assert np.array_equal(np.asarray(opened[1][0]), PIXELS[1]) and io.BytesIO(PNG[1]).getvalue() == Path(opened.samples[1][0]).read_bytes()
