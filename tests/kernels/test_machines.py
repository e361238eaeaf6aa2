"""What is equal to the bit on every machine, and what only within a bound (docs/machines.md).

Each machine is a process that pretends: numba compiles for the CPU that it is told, and torch and oneDNN take the
instructions that they are allowed.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from qlora_lab.kernels import vector

AVX2 = "+avx,+avx2,+fma,+f16c,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+sse,+popcnt"

MACHINES = {
    "this one": {},
    "a CPU with AVX2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": AVX2,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "a CPU of 2004": {
        "NUMBA_CPU_NAME": "nocona",
        "NUMBA_CPU_FEATURES": "+sse2,+sse",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "without kernels": {"QLORA_LAB_KERNELS": "reference"},
}
RACES = 3 if torch.backends.mkldnn.is_available() else 2


@cache
def probed(machine: str, folder: Path) -> dict:
    """What machine_probe.py prints there, with one thread and with two."""
    environment = os.environ | MACHINES[machine] | {"PYTHONPATH": "."}
    if "NUMBA_CPU_NAME" in MACHINES[machine]:
        environment |= {"NUMBA_CACHE_DIR": str(folder)}
    probe = Path(__file__).with_name("machine_probe.py")
    done = subprocess.run([sys.executable, str(probe)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_bytes_are_equal_on_every_machine_and_products_within_a_bound(machine, tmp_path_factory):
    if "NUMBA_CPU_NAME" in MACHINES[machine] and "avx2" not in vector.host_features():
        pytest.skip("needs AVX2 to pretend to be another x86 CPU")
    folder = tmp_path_factory.getbasetemp()
    there, here = probed(machine, folder), probed("this one", folder)
    readable = machine == "without kernels"
    assert there["kernels"] == ("reference" if readable else "cpu")
    assert there["vector"] == (vector.is_fast() and machine != "a CPU of 2004")
    for found in there["threads"].values():
        assert found["bytes"] == here["threads"]["1"]["bytes"] and len(found["bytes"]) == 16
        # the readable product rounds its float32 factors in another order
        assert readable or found["int8"] == here["threads"]["1"]["int8"]
        assert 0 < max(found["products"].values()) <= 1, found["products"]
        # float32 sums of at most 384 terms; the readable layer multiplies adapters in the dtype of x
        bound = torch.finfo(torch.bfloat16).eps if readable else 384 * 2.0**-24
        assert 0 < max(found["adapters"].values()) <= bound, found["adapters"]
        assert (len(found["products"]), len(found["adapters"])) == (RACES * 3 * 3, RACES * 2)
