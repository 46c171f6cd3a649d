"""Freed memory is used again instead of being mapped anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Tensors of 40 MB: left alone, glibc maps what is larger than 32 MB anew each time.
STEPS = """
import resource, sys, torch
from core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    kept = [torch.ones(10_000_000) for _ in range(3)]
# The heap finds its size first, which takes a dozen steps.
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("return") / 4
