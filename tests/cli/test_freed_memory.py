"""Freed memory stays with the process, so that a step does not fault its pages in again."""

import ctypes
import resource
import subprocess
import sys

import pytest

HELD = """
import os, sys
os.environ["THP_MEM_ALLOC_ENABLE"] = sys.argv[1]
from rlhf_lightning.cli.main import prepare_environment
prepare_environment()
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1])
before = resident()
bytearray(b"x") * 2**26
print(resident() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt"
)
def test_freed_memory_is_used_again_unless_turned_off() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", HELD, value], capture_output=True, check=True).stdout)
        for value in ("1", "0")
    )
    pages = 2**26 // resource.getpagesize()
    assert kept > 0.9 * pages
    assert returned < 0.1 * pages
