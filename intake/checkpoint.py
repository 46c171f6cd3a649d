"""Checkpoints of any container to one safetensors file: sniffed by magic, sized before anything is allocated."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from intake import archive, tensorfile
from intake.refusal import Refusal, damaged
from intake.tensorfile import ITEM_BYTES, Tensor
from intake.unpickling import STORAGES, Global, Interpreter, Storage, TensorRecord

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "netC", "student", "teacher", "ema", "weights", "params")
MAX_PICKLE = 64 << 20
MAX_ENTRIES = 20_000
MAX_DEPTH = 8


def take_in(path: Path, folder: Path) -> dict[str, Any]:
    """Read the checkpoint at `path`, write `folder/model.safetensors`, and return what it is as JSON.

    Raises `Refusal`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        container, source, tensors, wrapper = _shards(file, size, folder) or _whole(file, size)
        if not tensors:
            raise Refusal("unsupported_format", "the file holds no tensors", "Upload a state dict: torch.save(model.state_dict(), path).")
        if len(tensors) > tensorfile.MAX_TENSORS:
            raise Refusal("too_large", f"the file holds {len(tensors)} tensors", f"At most {tensorfile.MAX_TENSORS} are taken.")
        total = sum(tensor.bytes for tensor in tensors.values())
        if total > 4 * size + (1 << 20):
            raise Refusal("unsafe_file", f"{size} bytes would become {total}", "Save every tensor once: `{k: v.clone() for k, v in …}`.")
        broken = tensorfile.write(source, tensors, folder / "model.safetensors")
    if broken:
        raise Refusal(
            "weights_not_finite",
            f"{len(broken)} tensors hold NaN or infinite values, the first is {broken[0]}",
            "The training that made this checkpoint diverged; upload one from before that.",
        )
    return {
        "container": container,
        "wrapper": wrapper,
        "parameters": sum(tensor.items for tensor in tensors.values()),
        "tensors": {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in tensors.items()},
    }


def _whole(file: BinaryIO, size: int) -> tuple[str, BinaryIO, dict[str, Tensor], str]:
    """Return container, source, tensors and wrapper of a checkpoint in one file."""
    container, value, locate = _open(file, size)
    if container == "safetensors":
        return container, file, value, ""
    records, wrapper = find_state_dict(value)
    return container, file, {name: _resolve(name, record, locate) for name, record in records.items()}, wrapper


def _shards(file: BinaryIO, size: int, folder: Path) -> tuple[str, BinaryIO, dict[str, Tensor], str] | None:
    """Return the same of an archive of safetensors files with their index; None when the file is no such archive.

    The shards are laid out one after the other in a file without a name, so that tensors are found by one offset.
    """
    if _is_torch_zip(file):
        return None
    members = archive.members(file, size, folder)
    file.seek(0)
    names = sorted(name for name in members or () if name.endswith(".safetensors"))
    if not members or not names:
        return None
    index = [name for name in members if name.endswith(".safetensors.index.json")]
    if len(index) > 1 or (not index and len(names) > 1):
        raise Refusal(
            "unsupported_format", f"the archive has {len(names)} safetensors files and {len(index)} indices", "Add the model's one .safetensors.index.json."
        )
    source: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  read from until the tensors are written
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for name in names:
        start = source.seek(0, os.SEEK_END)
        source.writelines(members[name].pieces())
        length = source.tell() - start
        source.seek(start)
        for key, tensor in tensorfile.read(source, length).items():
            if key in tensors:
                raise Refusal("unsafe_file", f"tensor {key} is in {where[key]} and in {name}", "Save the model again.")
            tensors[key] = replace(tensor, storage_start=tensor.storage_start + start)
            where[key] = name.rsplit("/", 1)[-1]
    if index and _weight_map(members[index[0]]) != where:
        raise damaged(f"{index[0]} does not describe the tensors of the {len(names)} files")
    return "sharded safetensors", source, tensors, ""


def _is_torch_zip(file: BinaryIO) -> bool:
    """Say whether the file may be what torch.save writes; the strict reader then has the last word."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError):
        names = []
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    return head in archive.ZIP and not any(name.endswith(".safetensors") for name in names)


def _weight_map(member: archive.Member) -> dict[str, str]:
    if member.size > MAX_PICKLE:
        raise Refusal("too_large", f"{member.name} has {member.size} bytes", "An index names each tensor once.")
    try:
        found = json.loads(member.read())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(f"{member.name} is no index: {error}") from error
    return found if isinstance(found, dict) else {}


def _open(file: BinaryIO, size: int) -> tuple[str, Any, dict[str, tuple[int, int]]]:
    head = file.read(16)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        return ("zip", *_zip(file, size))
    if head[:2] == b"\x80\x02" and head[2:4] == b"\x8a\x0a":
        return ("legacy", *_legacy(file, size))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors", tensorfile.read(file, size), {}
    if head[:1] == b"\x80":
        raise Refusal("unsupported_format", "the file is a bare pickle, not a checkpoint of torch.save", "Save the state dict with torch.save or safetensors.")
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise Refusal("unsupported_format", "the file is HDF5 (Keras)", "Upload the state dict of a PyTorch model.")
    if (head[:1] == b"\x08" and b"onnx" in head) or b"pytorch" in head:
        raise Refusal("unsupported_format", "the file is ONNX", "Upload the state dict of the PyTorch model it was made from.")
    raise Refusal(
        "unsupported_format",
        "the file is no checkpoint: it starts like neither a torch.save file nor safetensors",
        "Upload what torch.save(model.state_dict(), path) or safetensors wrote; the file's extension does not matter.",
    )


# -- containers ----------------------------------------------------------------------------------------------------


def _zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read a torch.save archive; refuse whatever two zip readers could understand differently."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise damaged(f"the zip archive cannot be read: {error}") from error
    # Another reader could take what follows the end for an archive of its own.
    file.seek(max(size - 22, 0))
    if file.read(4) != b"PK\x05\x06":
        raise Refusal("unsafe_file", "something follows the archive's end", "Save the checkpoint again with torch.save.")
    if not entries or len(entries) > MAX_ENTRIES:
        raise damaged(f"the archive has {len(entries)} entries")
    names = [entry.filename for entry in entries]
    if len({name.lower() for name in names}) != len(names):
        raise Refusal("unsafe_file", "the archive has an entry twice", "Save the checkpoint again with torch.save.")
    roots = {name.split("/", 1)[0] for name in names}
    if len(roots) != 1:
        raise Refusal("unsafe_file", f"the archive has {len(roots)} top folders", "Save the checkpoint again with torch.save.")
    root = roots.pop()
    if f"{root}/constants.pkl" in names or any(name.startswith(f"{root}/code/") for name in names):
        raise Refusal("unsupported_format", "the file is a TorchScript program", "Upload the weights: torch.save(model.state_dict(), path).")
    members, place = {}, 0
    for entry in sorted(entries, key=lambda item: item.header_offset):
        start = _member_start(file, entry)
        if entry.header_offset < place:
            raise Refusal("unsafe_file", f"archive entry {entry.filename} overlaps another", "Save the checkpoint again with torch.save.")
        place = start + entry.file_size
        if place > size:
            raise damaged(f"archive entry {entry.filename} reaches past the end of the file")
        members[entry.filename.split("/", 1)[-1]] = (start, entry)
    if min(entry.header_offset for entry in entries) != 0:
        raise Refusal("unsafe_file", "something precedes the archive", "Save the checkpoint again with torch.save.")
    if "data.pkl" not in members:
        raise Refusal("unsupported_format", "the archive holds no data.pkl: it is no checkpoint", "Upload what torch.save wrote; datasets go to /v1/datasets.")
    if members["data.pkl"][1].file_size > MAX_PICKLE:
        raise Refusal("too_large", "the archive's data.pkl is over 64 MiB", "Save only the state dict.")
    for name, (start, entry) in members.items():
        _check_crc(file, name, start, entry)
    if "byteorder" in members:
        start, entry = members["byteorder"]
        file.seek(start)
        if file.read(min(entry.file_size, 16)) != b"little":
            raise Refusal("unsupported_format", "the checkpoint is big-endian", "Save it again on a little-endian machine.")
    import io

    start, entry = members["data.pkl"]
    file.seek(start)
    pickled = io.BytesIO(file.read(entry.file_size))
    value = Interpreter(_persistent).load(pickled)
    if pickled.tell() != entry.file_size:
        raise Refusal("unsafe_file", f"{entry.file_size - pickled.tell()} bytes follow the checkpoint's pickle", "Save the checkpoint again with torch.save.")
    return value, {name[5:]: (start, entry.file_size) for name, (start, entry) in members.items() if name.startswith("data/")}


def _member_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin, after checking that its local header agrees with the directory."""
    if entry.header_offset < 0:
        # zipfile makes offsets relative to where it believes the archive begins.
        raise damaged(f"archive entry {entry.filename} lies before the file")
    file.seek(entry.header_offset)
    local = file.read(30)
    if len(local) != 30 or local[:4] != b"PK\x03\x04":
        raise damaged(f"archive entry {entry.filename} has no local header")
    flags, method = int.from_bytes(local[6:8], "little"), int.from_bytes(local[8:10], "little")
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    if method or entry.compress_type or entry.compress_size != entry.file_size:
        raise Refusal("unsafe_file", f"archive entry {entry.filename} is compressed", "torch.save stores without compression; save again.")
    if flags & ~0x808 or entry.flag_bits & ~0x808:
        raise Refusal("unsafe_file", f"archive entry {entry.filename} has flags {flags:#x}", "Save the checkpoint again with torch.save.")
    if file.read(name_length) != entry.orig_filename.encode("utf-8"):
        raise Refusal("unsafe_file", f"archive entry {entry.filename} has two names", "Save the checkpoint again with torch.save.")
    return entry.header_offset + 30 + name_length + extra_length


def _check_crc(file: BinaryIO, name: str, start: int, entry: zipfile.ZipInfo) -> None:
    file.seek(start)
    left, checksum = entry.file_size, 0
    while left:
        piece = file.read(min(tensorfile.CHUNK, left))
        if not piece:
            raise damaged(f"archive entry {name} is cut short")
        checksum = zlib.crc32(piece, checksum)
        left -= len(piece)
    if checksum != entry.CRC:
        raise damaged(f"archive entry {name} fails its checksum")


def _legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read the stream form of torch before 1.6: five pickles, then each storage as a count and its bytes."""
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        storage = _persistent(identity)
        if storages.setdefault(storage.key, storage) != storage:
            raise damaged(f"storage {storage.key} is described in two ways")
        return storage

    def plain(identity: Any) -> Storage:
        raise damaged("a storage appears outside the checkpoint's object")

    if Interpreter(plain).load(file) != LEGACY_MAGIC:
        raise damaged("the magic number is wrong")
    if Interpreter(plain).load(file) != 1001:
        raise Refusal("unsupported_format", "the checkpoint has an unknown protocol version", "Save it again with a current torch.")
    system = Interpreter(plain).load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refusal("unsupported_format", "the checkpoint is big-endian", "Save it again on a little-endian machine.")
    value = Interpreter(persistent).load(file)
    keys = Interpreter(plain).load(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise damaged("the list of storages does not match the object")
    located = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        start, length = file.tell(), count * ITEM_BYTES[storages[key].dtype]
        if count != storages[key].items or start + length > size:
            raise damaged(f"storage {key} has {count} elements instead of {storages[key].items}, or the file is cut short")
        located[key] = (start, length)
        file.seek(length, os.SEEK_CUR)
    if file.tell() != size:
        raise damaged(f"{size - file.tell()} bytes follow the last storage")
    return value, located


def _persistent(identity: Any) -> Storage:
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise damaged("a persistent id is not a storage")
    _, kind, key, _, items = identity[:5]
    if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str) or type(items) is not int or items < 0:
        raise damaged("a storage is described wrongly")
    return Storage(STORAGES[kind.name], key, items)


def _resolve(name: str, record: TensorRecord, located: dict[str, tuple[int, int]]) -> Tensor:
    storage = record.storage
    start, length = located.get(storage.key, (0, -1))
    if length != storage.items * ITEM_BYTES[storage.dtype]:
        raise damaged(f"the storage of tensor {name} has {length} bytes, not the {storage.items} elements it claims")
    shape = tensorfile.checked_shape(name, record.shape)
    return tensorfile.checked(name, Tensor(storage.dtype, shape, record.stride, record.offset, start, storage.items))


# -- the state dict among everything else --------------------------------------------------------------------------


def find_state_dict(value: Any) -> tuple[dict[str, TensorRecord], str]:
    """Return the state dict inside what was saved, and the path to it ("" at the top)."""
    if isinstance(value, TensorRecord):
        raise Refusal("unsupported_format", "the file holds one tensor", "Upload a state dict: torch.save(model.state_dict(), path).")
    if not isinstance(value, dict):
        raise Refusal("unsupported_format", f"the file holds a {type(value).__name__}", "Upload a state dict: torch.save(model.state_dict(), path).")
    if _is_state_dict(value):
        return _tensors(value), ""
    for name in WRAPPERS:
        inner = value.get(name)
        if isinstance(inner, dict) and inner:
            found, path = find_state_dict(inner)
            return found, f"{name}.{path}".rstrip(".")
    nested = [name for name, inner in value.items() if isinstance(inner, dict) and _is_state_dict(inner)]
    if len(nested) == 1:
        return _tensors(value[nested[0]]), str(nested[0])
    raise Refusal(
        "unsupported_format",
        f"no state dict was found among the keys {sorted(map(str, value))[:12]}" + (f"; {nested} each look like one" if nested else ""),
        "Upload the state dict alone: torch.save(model.state_dict(), path).",
    )


def _is_state_dict(value: dict[Any, Any]) -> bool:
    return bool(value) and sum(isinstance(item, TensorRecord) for item in value.values()) >= 0.9 * len(value)


def _tensors(value: dict[Any, Any]) -> dict[str, TensorRecord]:
    return {str(name): item for name, item in value.items() if isinstance(item, TensorRecord)}
