"""Freed memory stays with the process, so that a step does not fault its pages in again; code of products does not."""

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

CACHED = """
from rlhf_lightning.cli.main import prepare_environment
prepare_environment()
import torch
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1])
torch.set_num_threads(1)
states, weight = torch.zeros(1000, 32, dtype=torch.bfloat16), torch.zeros(32, 32, dtype=torch.bfloat16)
grown = []
for start in (1, 321, 641):
    before = resident()
    for rows in range(start, start + 320):
        states[:rows] @ weight
    grown.append(resident() - before)
print(*grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_sizes_of_products() -> None:
    run = subprocess.run([sys.executable, "-c", CACHED], capture_output=True, check=True, text=True)
    first, _, third = (int(pages) for pages in run.stdout.split())
    if first * resource.getpagesize() < 2**24:
        pytest.skip("oneDNN keeps little code for products on this processor")
    assert third < 0.2 * first


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
