"""Hostile files, made here: payloads are inert, they would only make a marker. `python -m tests.intake.corpus FOLDER MARKER`."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# What real exploits import, by family: shells, code, files, network, indirection, loaders inside loaders, frameworks' own.
GADGETS = (
    """
os system|posix system|nt system|os popen|os execv|os mkdir|subprocess Popen|subprocess check_output|subprocess getoutput|pty spawn
builtins eval|builtins exec|builtins compile|builtins __import__|builtins getattr|builtins open|builtins apply|__builtin__ eval|__builtin__ file
code InteractiveInterpreter|codeop compile_command|types FunctionType|types CodeType|marshal loads|importlib import_module|runpy _run_code|runpy run_path
timeit timeit|cProfile run|profile run|pdb run|bdb Bdb.run|trace Trace.run|doctest debug_script|idlelib.run Executive
shutil rmtree|pathlib Path.unlink|tempfile mkdtemp|zipfile ZipFile.extractall|tarfile open|logging FileHandler|sqlite3 connect
socket create_connection|urllib.request urlopen|http.client HTTPSConnection|requests.api get|ftplib FTP|webbrowser open|smtplib SMTP|xmlrpc.client ServerProxy
operator attrgetter|operator methodcaller|functools partial|functools reduce|itertools starmap|multiprocessing.util spawnv_passfds|asyncio.subprocess create_subprocess_shell
pickle loads|_pickle loads|dill loads|cloudpickle loads|joblib load|pandas.io.pickle read_pickle|numpy load|torch load|torch.storage _load_from_bytes|torch.jit load
torch.hub load|torch._dynamo.guards GuardBuilder.get|torch.utils.cpp_extension load|torch.fx.graph_module reduce_graph_module|torch.serialization load|torch.distributed.rpc rpc_sync
numpy.f2py.crackfortran getlincoef|numpy.testing._private.utils runstring|numpy.distutils.exec_command exec_command|pip main|setuptools sandbox.run_setup|venv create|ensurepip bootstrap
ctypes CDLL|ctypes.util find_library|sys exit|sys settrace|signal signal|threading Thread|gc get_objects|inspect getattr_static|pydoc pipepager|test.support.script_helper assert_python_ok
aiohttp.client ClientSession|tensorflow.io read_file|keras.models load_model|transformers pipeline|torch.nn.modules.linear Linear|__main__ Model|timm.models resnet18|lib2to3.pgen2.grammar Grammar.loads
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


SEEDS = Path(__file__).with_name("seeds")

# Memo 60 is a list of two lists of two lists …: small, until somebody writes it out. Nothing is left on the stack.
DOUBLING = b"]q\x000" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) + b"0" for n in range(60))


def torch_zip(pickled: bytes, *, data: bytes = b"\0" * 64, root: str = "archive", extra: dict[str, bytes] | None = None) -> bytes:
    """A torch.save archive around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {f"{root}/data.pkl": pickled, f"{root}/data/0": data, f"{root}/version": b"3\n", **(extra or {})}.items():
            archive.writestr(name, content)
    return out.getvalue()


def legacy(pickled: bytes, *, data: bytes = struct.pack("<q", 16) + b"\0" * 64) -> bytes:
    """The stream form around any pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(1001, 2) + pickle.dumps(system, 2)
    return head + pickled + pickle.dumps(["0"], 2) + data


def call(name: str, marker: str) -> bytes:
    """A pickle that would call a global with the marker's path."""
    module, attribute = name.split(" ")
    return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n" + text(marker) + b"\x85R."


def text(value: str) -> bytes:
    """A unicode literal."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor(
    *, kind: bytes = b"FloatStorage", key: str = "0", items: int = 16, offset: bytes = b"K\x00", shape: bytes = b"K\x10\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    """The opcodes of one tensor record."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + b"J" + struct.pack("<i", items) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def state(*records: bytes) -> bytes:
    """A pickled state dict of records."""
    return b"\x80\x02}(" + b"".join(text(f"t{number}") + record for number, record in enumerate(records)) + b"u."


def checkpoints(marker: str) -> Iterator[tuple[str, bytes]]:
    """Yield hostile checkpoints: calls, containers that confuse, bombs, lies about tensors."""
    for number, gadget in enumerate(GADGETS):
        pickled = call(gadget, marker)
        yield f"calls {gadget}", legacy(pickled) if number % 3 == 2 else torch_zip(pickled)
    mkdir = text(marker) + b"\x85R"
    yield "stack global", torch_zip(b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + mkdir + b".")
    yield "stack global from pieces", torch_zip(b"\x80\x04" + text("os") + b"\x94" + text("mkdir") + b"\x94h\x00h\x01\x93" + mkdir + b".")
    yield "inst", torch_zip(b"(" + text(marker) + b"ios\nmkdir\n.")
    yield "obj", torch_zip(b"(cos\nmkdir\n" + text(marker) + b"o.")
    yield "newobj", torch_zip(b"\x80\x02cos\nmkdir\n" + text(marker) + b"\x85\x81.")
    yield "newobj of a harmless class, then state", torch_zip(b"\x80\x02ccollections\nOrderedDict\n)\x81}(" + text("__class__") + b"cos\nmkdir\nub.")
    yield "extension registry", torch_zip(b"\x80\x02\x82\x01" + mkdir + b".")
    yield "text persistent id", torch_zip(b"P" + marker.encode() + b"\n.")
    yield "persistent id of a call", torch_zip(b"\x80\x02" + call("os mkdir", marker)[2:-1] + b"Q.")
    yield "second pickle after the first", torch_zip(state(tensor()) + call("os mkdir", marker))
    yield "call hidden in a key", torch_zip(b"\x80\x02}(" + call("os mkdir", marker)[2:-1] + tensor() + b"u.")
    yield "call popped again", torch_zip(b"\x80\x02" + call("os mkdir", marker)[2:-1] + b"0" + state(tensor())[2:])
    yield "call in a tensor's hooks", torch_zip(state(tensor().replace(b"ccollections\nOrderedDict\n)R", call("os mkdir", marker)[2:-1])))
    yield "global with a dot", torch_zip(b"\x80\x04" + text("builtins") + text("eval.__call__") + b"\x93" + mkdir + b".")
    yield "global with a newline in its name", torch_zip(b"\x80\x04" + text("os\n") + text("mkdir") + b"\x93" + mkdir + b".")
    yield "lookalike letters", torch_zip(b"\x80\x04" + text("оs") + text("mkdir") + b"\x93" + mkdir + b".")
    yield "reduce of a string", torch_zip(b"\x80\x02" + text("os.mkdir") + mkdir + b".")
    yield "build on a list", torch_zip(b"\x80\x02]}b.")
    yield "set items of a tensor", torch_zip(b"\x80\x02" + tensor() + text("a") + text("b") + b"s.")
    # Bombs of memory and time.
    yield "bytearray of a gigabyte", torch_zip(b"\x80\x02cbuiltins\nbytearray\n" + b"J\x00\x00\x00\x40\x85R.")
    yield "tensor without bytes", torch_zip(b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x40\x85R.")
    yield "bytes of an exabyte", torch_zip(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")
    yield "bytes of an exabyte, legacy", legacy(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")
    yield "text of four gigabytes", torch_zip(b"\x80\x02X\xff\xff\xff\xffx.")
    yield "number of two gigabytes", torch_zip(b"\x80\x02\x8b\xff\xff\xff\x7fx.")
    yield "frame of an exabyte", torch_zip(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.")
    yield "deep tuples", torch_zip(b"\x80\x02N" + b"\x85" * 200_000 + b".")
    yield "deep lists", torch_zip(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    yield "deep marks", torch_zip(b"\x80\x02" + b"(" * 300_000 + b".")
    yield "itself in itself", torch_zip(b"\x80\x02]q\x00h\x00a.")
    yield (
        "doubling references",
        torch_zip(b"\x80\x02" + DOUBLING + b"h\x3c."),
    )
    yield (
        "colliding integers",
        torch_zip(
            b"\x80\x02}("
            + b"".join(b"\x8a\x10" + ((1 << 61) - 1 + (number << 61)).to_bytes(16, "little", signed=True) + b"N" for number in range(20_000))
            + b"u."
        ),
    )
    yield "million memos", torch_zip(b"\x80\x02" + b"".join(b"Nr" + struct.pack("<I", number) + b"0" for number in range(200_000)) + b"N.")
    yield "memo that is not there", torch_zip(b"\x80\x02h\x05.")
    yield "huge memo index", torch_zip(b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.")
    yield "number with a million digits", torch_zip(b"I" + b"9" * 1_000_000 + b"\n.")
    yield "slow codec", torch_zip(b"\x80\x02c_codecs\ndecode\n" + text("a" * 50_000) + text("idna") + b"\x86R.")
    yield "many keys", torch_zip(b"\x80\x02}(" + b"".join(text(f"k{number}") + b"N" for number in range(100_000)) + b"u.")
    yield "doubling references as size", torch_zip(b"\x80\x02" + DOUBLING + b"}" + text("t") + tensor(shape=b"h\x3c\x85") + b"s.")
    yield "doubling references as stride", torch_zip(b"\x80\x02" + DOUBLING + b"}" + text("t") + tensor(stride=b"h\x3c\x85") + b"s.")
    yield "doubling references as storage key", legacy(state(tensor())).replace(pickle.dumps(["0"], 2), b"\x80\x02" + DOUBLING + b"]h\x3ca.")
    yield "legacy bytes of an exbyte", legacy(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")
    yield "size of ten thousand bytes", torch_zip(state(tensor(shape=b"\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000 + b"\x85")))
    # Lies about tensors.
    for name, record in {
        "stride zero": tensor(shape=b"J\x00\x00\x00\x40\x85", stride=b"K\x00\x85"),
        "negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
        "negative size": tensor(shape=b"J\xff\xff\xff\xff\x85"),
        "reaches outside": tensor(offset=b"K\x08"),
        "negative offset": tensor(offset=b"J\xf8\xff\xff\xff"),
        "huge shape": tensor(shape=b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85"),
        "product overflows": tensor(shape=b"\x8a\x05\x00\x00\x00\x00\x01\x8a\x05\x00\x00\x00\x00\x01\x86", stride=b"K\x01K\x01\x86"),
        "text as size": tensor(shape=text("16") + b"\x85"),
        "truth as size": tensor(shape=b"\x88\x85"),
        "strides of another length": tensor(stride=b"K\x01K\x01\x86"),
        "two hundred dimensions": tensor(shape=b"(" + b"K\x01" * 200 + b"t", stride=b"(" + b"K\x01" * 200 + b"t"),
        "more items than bytes": tensor(items=1 << 28, shape=b"J\x00\x00\x00\x10\x85"),
        "storage that is not there": tensor(key="9"),
        "storage outside the archive": tensor(key="../../etc/passwd"),
        "quantised storage": tensor(kind=b"QInt8Storage"),
        "unknown storage": tensor(kind=b"ComplexFloatStorage"),
    }.items():
        yield name, torch_zip(state(record))
        yield f"{name}, legacy", legacy(state(record))
    yield "sparse tensor", torch_zip(b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.")
    yield "meta tensor", torch_zip(b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R.")
    yield "tensor subclass", torch_zip(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.")
    yield "hundred aliases", torch_zip(state(*[tensor(items=1 << 18, shape=b"J\x00\x00\x04\x00\x85")] * 100), data=b"\0" * (4 << 18))
    # Containers that two readers would read differently.
    good = torch_zip(state(tensor()))
    yield "two data.pkl", torch_zip(state(tensor()), extra={"archive/DATA.PKL": call("os mkdir", marker)})
    yield "two roots", torch_zip(state(tensor()), extra={"other/data.pkl": call("os mkdir", marker)})
    yield "two archives in one", torch_zip(call("os mkdir", marker)) + good
    yield "archive after legacy", legacy(state(tensor())) + good
    yield "wrong checksum", good.replace(b"\0" * 64, b"\1" * 64)
    yield "bytes after the archive's end", good + b"tail" * 100
    yield "bytes before the archive", b"PK\x03\x04junk" + good
    yield "encrypted flag", flags(good, 1)
    yield "strong encryption flag", flags(good, 64)
    yield "compressed pickle", deflated(state(tensor()))
    yield "compressed storage of a gigabyte", deflated(state(tensor(items=1 << 24, shape=b"J\x00\x00\x00\x01\x85")), data=b"\0" * (1 << 26))
    yield "directory's name differs", renamed(good, b"data.pkl", b"data.pkx")
    yield "seven zip", b"7z\xbc\xaf\x27\x1c" + b"\0" * 100
    yield "rar", b"Rar!\x1a\x07\x01\x00" + b"\0" * 100
    yield "empty archive", b"PK\x05\x06" + b"\0" * 18
    yield "half an archive", good[: len(good) // 2]
    yield "name that leaves the folder", torch_zip(state(tensor()), root="../archive")
    yield "hostile tensor name", torch_zip(b"\x80\x02}" + text("<img src=x onerror=alert(1)>") + tensor() + b"s.")
    yield "tensor name with a line break", torch_zip(b"\x80\x02}" + text("a\r\nSet-Cookie: x") + tensor() + b"s.")
    yield "tensor name of a megabyte", torch_zip(b"\x80\x02}" + text("a" * (1 << 20)) + tensor() + b"s.")


def flags(data: bytes, bits: int) -> bytes:
    """Set general-purpose flags in every local header and directory entry."""
    raw = bytearray(data)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = raw.find(signature)
        while start >= 0:
            raw[start + place] |= bits
            start = raw.find(signature, start + 4)
    return bytes(raw)


def deflated(pickled: bytes, data: bytes = b"\0" * 64) -> bytes:
    """A torch.save archive whose members are compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return out.getvalue()


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """Change a name in the directory and not in the local header."""
    place = data.rfind(old)
    return data[:place] + new + data[place + len(new) :]


def safetensors() -> Iterator[tuple[str, bytes]]:
    """Yield malformed safetensors."""

    def file(header: bytes, body: bytes = b"\0" * 8, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + body

    def entry(**change: object) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}).encode()

    yield "length beyond the file", file(entry(), length=1 << 40)
    yield "length zero", file(b"{", length=0)
    yield "no json", file(b"{" + b"x" * 40)
    yield "a list", file(b"[]      ")
    yield "not closed", file(entry()[:-1])
    yield "twice the same name", file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
    yield "unknown type", file(entry(dtype="F128"))
    yield "negative offset", file(entry(data_offsets=[-8, 0]))
    yield "offsets backwards", file(entry(data_offsets=[8, 0]))
    yield "offsets beyond", file(entry(data_offsets=[8, 16]))
    yield "hole at the start", file(entry(data_offsets=[4, 12]), b"\0" * 12)
    yield "size does not fit", file(entry(shape=[3]))
    yield "negative size", file(entry(shape=[-2]))
    yield "size as text", file(entry(shape=["2"]))
    yield "size as fraction", file(entry(shape=[2.0]))
    yield "size overflows", file(entry(shape=[1 << 62, 4]))
    yield "three offsets", file(entry(data_offsets=[0, 8, 8]))
    yield "extra key", file(entry(code="os.system"))
    yield "bytes after the end", file(entry()) + b"tail"
    yield "bytes missing", file(entry(), b"\0" * 7)
    yield "overlap", file(json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode())
    yield "hostile name", file(json.dumps({"<script>": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode())
    yield "deep json", file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "number of a million digits", file(b'{"a":' + b"9" * 1_000_000 + b"}")


def png(width: int, height: int, chunks: bytes = b"", *, data: bytes | None = None) -> bytes:
    """A PNG that claims a size, with more chunks and any image data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    body = zlib.compress(b"\0" * 100) if data is None else data
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + (chunk(b"zTXt", b"k\0\0" + zlib.compress(chunks)) if chunks else b"") + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def npy(shape: str, *, descr: str = "|u1", body: bytes = b"\0" * 16, version: bytes = b"\x01\x00") -> bytes:
    """An .npy with any header."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body


def datasets(marker: str) -> Iterator[tuple[str, bytes]]:
    """Yield hostile archives, images and arrays."""

    def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return out.getvalue()

    picture = png(1, 1, data=zlib.compress(b"\0\1\2\3"))
    for name, path in {
        "parent folder": "../../a/1.png", "inner parent folder": "a/../../1.png", "absolute": "/tmp/a/1.png", "windows drive": "c:/a/1.png", "backslashes": "a\\..\\1.png",
        "escape sequence": "a/\x1b[2J.png", "line break": "a/1\r\n.png", "right to left": "a/\u202egnp.exe.png", "delete": "a/\x7f.png", "bell": "a/\x07.png",
    }.items():  # fmt: skip
        yield f"name: {name}", zipped({path: picture, "b/2.png": picture})
    yield "names differ in case", zipped({"a/x.png": picture, "A/X.png": picture})
    yield "names differ in normal form", zipped({"a/\u00e9.png": picture, "a/e\u0301.png": picture})
    yield "zip bomb", zipped({"a/1.png": b"\0" * (32 << 20)}, zipfile.ZIP_DEFLATED)
    yield "archive in an archive", zipped({"a/inner.zip": zipped({"1.png": picture})})
    yield "encrypted", flags(zipped({"a/1.png": picture}), 1)
    yield "only folders", zipped({"a/": b"", "b/": b""})
    yield "pixel flood", zipped({"a/1.png": png(60_000, 60_000)})
    yield "169 million pixels", zipped({"a/1.png": png(13_000, 13_000)})
    yield "text bomb in a picture", zipped({"a/1.png": png(8, 8, b"\0" * (64 << 20))})
    yield "picture without pixels", zipped({"a/1.png": png(0, 0)})
    yield "svg", zipped({"a/1.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>x</script></svg>'})
    yield "eps", zipped({"a/1.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(%pipe%touch marker) (w) file\n"})
    yield "pdf", zipped({"a/1.jpg": b"%PDF-1.4\n" + b"x" * 100})
    yield "psd", zipped({"a/1.png": b"8BPS\0\1" + b"\0" * 100})
    yield "half a jpeg", zipped({"a/1.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF" + b"\0" * 50})
    yield "tiff that refers to itself", zipped({"a/1.tif": b"II*\0\x08\0\0\0\1\0\0\1\3\0\1\0\0\0\1\0\0\0\x08\0\0\0"})
    yield "pickle as picture", zipped({"a/1.png": call("os mkdir", marker)})
    yield "pickled array", zipped({"images.npy": npy("(1,)", descr="|O", body=call("os mkdir", marker))})
    yield "array of terabytes", zipped({"images.npy": npy("(1000000, 1000, 1000, 3)")})
    yield "array of a negative size", zipped({"images.npy": npy("(-1, 2, 2, 3)")})
    yield "array whose size overflows", zipped({"images.npy": npy(f"({1 << 62}, 4, 4, 3)")})
    yield "code in an array's header", zipped({"images.npy": npy("__import__('os').mkdir('x')")})
    yield "structured array", zipped({"images.npy": npy("(1,)", descr="V16")})
    yield "deep header", zipped({"images.npy": npy("(" * 60)})
    yield "array of version nine", zipped({"images.npy": npy("(1, 2, 2, 3)", version=b"\x09\x00")})
    yield "labels of another length", zipped({"images.npy": npy("(1, 2, 2, 3)", body=b"\0" * 12), "labels.npy": npy("(2,)", descr="<i8", body=b"\0" * 16)})
    yield "label minus one", zipped({"images.npy": npy("(1, 2, 2, 3)", body=b"\0" * 12), "labels.npy": npy("(1,)", descr="<i8", body=b"\xff" * 8)})
    yield (
        "label of a billion",
        zipped({"images.npy": npy("(1, 2, 2, 3)", body=b"\0" * 12), "labels.npy": npy("(1,)", descr="<i8", body=struct.pack("<q", 10**9))}),
    )
    yield "formula as label", zipped({"1.png": picture, "labels.csv": b"file,label\n1.png,=cmd|'/c calc'!A1\n"})
    yield "csv of quotes", zipped({"1.png": picture, "labels.csv": b'file,label\n"' + b'"' * 100_001})
    yield "csv of one endless line", zipped({"1.png": picture, "labels.csv": b"file,label\n" + b"a" * 10_000_000})
    yield "cifar batch that calls", zipped({"data_batch_1": call("os mkdir", marker)})
    batch = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, 2)[2:-1]
    for key in ("filenames", "label_names"):
        doubled = b"\x80\x02" + DOUBLING + batch.replace(b"q\x00", b"", 1) + text(key) + b"](h\x3ces."
        yield (
            f"cifar {key} that double",
            zipped({"data_batch_1": b"\x80\x02" + batch + b".", "data_batch_2" if key == "filenames" else "batches.meta": doubled}),
        )
    yield "cifar batch of a lie", zipped({"data_batch_1": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, 2)})
    yield "parquet of nothing", b"PAR1" + b"\0" * 100 + b"PAR1"
    yield "parquet footer beyond", b"PAR1" + b"\0" * 20 + struct.pack("<I", 1 << 30) + b"PAR1"
    yield "gzip of a bomb", zlib_bomb()
    negative = bytearray(b".hidden".ljust(124, b"\0") + b"\xff" * 8 + struct.pack(">i", -512) + b"0" * 12 + b" " * 8 + b"0").ljust(
        257, b"\0"
    ) + b"ustar\x0000".ljust(255, b"\0")
    negative[148:156] = f"{sum(negative):06o}\0 ".encode()
    yield "tar that leads back", bytes(negative) + b"\0" * 1024
    yield "tar of lies", (b"a/1.png".ljust(124, b"\0") + b"77777777777\0" + b"0" * 20).ljust(257, b"\0") + b"ustar\0" + b"00" + b"\0" * 1000


def fuzzed(reader: str) -> Iterator[bytes]:
    """Yield what fuzzing a reader (`model` or `dataset`) has found worth keeping: inputs that took it to places no others had."""
    with zipfile.ZipFile(SEEDS / f"{reader}.zip") as kept:
        for name in kept.namelist():
            yield kept.read(name)


def zlib_bomb() -> bytes:
    """A small gzip of many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(256)) + packer.flush()


def main(folder: Path, marker: Path) -> None:
    """Read every file with the parsers alone, no fence; print a JSON line a file, and the peak of memory at the end."""
    import resource
    import time

    from intake import checkpoint, dataset
    from intake.refusal import Refusal

    readers = [
        ("model", checkpoint.take_in, [*checkpoints(str(marker)), *((f"safetensors: {name}", data) for name, data in safetensors())]),
        ("dataset", dataset.take_in, list(datasets(str(marker)))),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, reader, files in readers:
        for name, data in files:
            path, out = folder / "file", folder / "out"
            path.write_bytes(data)
            out.mkdir(exist_ok=True)
            started = time.perf_counter()
            try:
                reader(path, out)
                found = {"code": None, "message": "accepted", "advice": ""}
            except Refusal as refusal:
                found = {"code": refusal.code, "message": refusal.message, "advice": refusal.advice}
            except (MemoryError, RecursionError) as error:
                found = {"code": "unsafe_file", "message": f"ran into a limit: {type(error).__name__}", "advice": "smaller"}
            print(json.dumps({"kind": kind, "name": name, "bytes": len(data), "seconds": round(time.perf_counter() - started, 3), **found}))
    print(json.dumps({"peak_megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
