"""The fence around a process that reads a stranger's bytes: what it cannot do even when its parser is wrong.

Every layer is tried and proved by `self_test`; a layer the host lacks is named, not assumed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
# Numbers of the calls to deny, (x86-64, arm64); None where the architecture lacks one.
FORBIDDEN = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "sendto": (44, 206), "sendmsg": (46, 211),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "ptrace": (101, 117),
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "io_uring_setup": (425, 425),
    "keyctl": (250, 219), "add_key": (248, 217), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "chroot": (161, 51),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "symlink": (88, None), "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, DENY, NOT_THERE = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_ACCESS, WRITE_ACCESS = 0x0C, 0x1FFF & ~0x0D  # read file and directory; everything of ABI 1 but execute


def confine(*, readable: Sequence[Path], writable: Sequence[Path], memory: int, cpu_seconds: int, file_bytes: int) -> list[str]:
    """Give up everything a reader of files does not need; return the names of the layers that took hold.

    Args:
        readable, writable: the only paths that stay reachable, where the kernel can enforce it.
        memory, file_bytes: limits in bytes, of the address space and of any file written.
    """
    layers = limits(memory=memory, cpu_seconds=cpu_seconds, file_bytes=file_bytes, descriptors=64)
    if sys.platform != "linux":
        return layers
    die_with_parent()
    layers += no_new_privileges()
    layers += _landlock(readable, writable)
    layers += _seccomp(_filter_reader())
    return layers


def confine_engine(*, memory: int | None, file_bytes: int | None) -> list[str]:
    """Fence the engine: it may start threads and use the GPU, but neither the network nor new privileges."""
    layers = limits(memory=memory, cpu_seconds=None, file_bytes=file_bytes, descriptors=4096)
    if sys.platform != "linux":
        return layers
    die_with_parent()
    return layers + no_new_privileges() + _seccomp(_filter_network())


def limits(*, memory: int | None, cpu_seconds: int | None, file_bytes: int | None, descriptors: int) -> list[str]:
    """Set resource limits; None leaves one as it is."""
    wanted = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, descriptors)]
    wanted += [(resource.RLIMIT_AS, memory)] if memory is not None and sys.platform == "linux" else []
    wanted += [(resource.RLIMIT_CPU, cpu_seconds)] if cpu_seconds is not None else []
    wanted += [(resource.RLIMIT_FSIZE, file_bytes)] if file_bytes is not None else []
    for kind, value in wanted:
        hard = resource.getrlimit(kind)[1]
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (ceiling, ceiling))
    return ["rlimits"]


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    parent = os.getppid()
    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def no_new_privileges() -> list[str]:
    """Renounce set-uid programs and being traced."""
    libc = _libc()
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    return ["no_new_privs"] if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 else []


def self_test(secret: Path) -> dict[str, bool]:
    """Try, inside the fence, what it must deny; return {what: denied}.

    Args:
        secret: an existing file outside the allowed paths.
    """
    return {
        "network": _denied(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()),
        "subprocess": _denied(lambda: os.posix_spawn("/bin/true", ["true"], {})),
        "files": _denied(secret.read_bytes),
        "kill": _denied(lambda: os.kill(os.getppid(), 0)),
    }


def _denied(act: object) -> bool:
    try:
        act()  # type: ignore[operator]
    except OSError:
        return True
    return False


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# -- Landlock: which files ---------------------------------------------------------------------------------------


def _landlock(readable: Sequence[Path], writable: Sequence[Path]) -> list[str]:
    libc = _libc()
    if libc.syscall(LANDLOCK_CREATE, None, 0, 1) < 1:
        return []
    attributes = ctypes.create_string_buffer(struct.pack("=Q", READ_ACCESS | WRITE_ACCESS | 1))
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, 8, 0)
    if ruleset < 0:
        return []
    try:
        for path, access in [(p, READ_ACCESS) for p in readable] + [(p, READ_ACCESS | WRITE_ACCESS) for p in writable]:
            if not path.exists():
                continue
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # A file takes only the rights that make sense for files: read, write and (ABI 3) truncate.
            rights = access if path.is_dir() else access & 0x06
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
            added = libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(handle)
            if added:
                return []
        no_new_privileges()
        return ["landlock"] if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0 else []
    finally:
        os.close(ruleset)


# -- seccomp: which system calls -----------------------------------------------------------------------------------


def _seccomp(program: bytes | None) -> list[str]:
    if program is None:
        return []
    buffer = ctypes.create_string_buffer(program, len(program))
    prog = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    return ["seccomp"] if _libc().prctl(PR_SET_SECCOMP, 2, prog, 0, 0) == 0 else []


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _head() -> tuple[int, bytes] | None:
    """Return (column of the tables above, instructions that leave the call's number in the accumulator)."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return None
    load = [_op(0x20, 4), _op(0x15, AUDIT_ARCH[machine], 1, 0), _op(0x06, DENY), _op(0x20, 0)]
    if machine == "x86_64":
        # The x32 numbering would slip past every comparison below.
        load += [_op(0x35, 0x40000000, 0, 1), _op(0x06, DENY)]
    return (0 if machine == "x86_64" else 1), b"".join(load)


def _filter_reader() -> bytes | None:
    head = _head()
    if head is None:
        return None
    column, program = head
    for numbers in FORBIDDEN.values():
        if numbers[column] is not None:
            program += _op(0x15, numbers[column] or 0, 0, 1) + _op(0x06, DENY)
    # clone3 hides its flags in memory; without it libc falls back to clone, which may only make threads.
    program += _op(0x15, CLONE3[column], 0, 1) + _op(0x06, NOT_THERE)
    program += _op(0x15, CLONE[column], 0, 3) + _op(0x20, 16) + _op(0x45, 0x10000, 1, 0) + _op(0x06, DENY)
    return program + _op(0x06, ALLOW)


def _filter_network() -> bytes | None:
    head = _head()
    if head is None:
        return None
    column, program = head
    program += _op(0x15, FORBIDDEN["io_uring_setup"][column] or 0, 0, 1) + _op(0x06, DENY)
    # Of all socket families only AF_UNIX (1) stays: drivers and thread pools use it.
    program += _op(0x15, FORBIDDEN["socket"][column] or 0, 0, 3) + _op(0x20, 16) + _op(0x15, socket.AF_UNIX, 1, 0) + _op(0x06, DENY)
    return program + _op(0x06, ALLOW)
