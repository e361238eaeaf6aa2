"""Read the conformance vectors with numpy alone. Copy this file: it belongs to no package.

    for case in read("data/conformance"):
        packed, absmax = my_quantize(case["input"], case["kind"], case["block"])
        assert packed.tobytes() == case["tensors"]["weight"].tobytes()

In: the folder of cases.json and vectors.safetensors. Out: one dict a case; README.md says what is in it.
Licence: CC0-1.0.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "BF16": np.uint16}  # numpy has no bf16: its bits


def read(folder) -> list[dict]:
    """Return the cases: what cases.json says of each, with its `input`, `decoded` and `tensors` as arrays.

    bf16 arrays are the uint16 bits; `as_float32` converts them. A case that is `refused` has neither `decoded` nor
    `tensors`. Raises ValueError if vectors.safetensors is not the file that cases.json describes.
    """
    index = json.loads((Path(folder) / "cases.json").read_text("utf-8"))
    raw = (Path(folder) / "vectors.safetensors").read_bytes()
    if hashlib.sha256(raw).hexdigest() != index["vectors_sha256"]:
        raise ValueError("vectors.safetensors is damaged: its checksum is not the one in cases.json")
    arrays = read_safetensors(raw)
    cases = []
    for case in index["cases"]:
        prefix = case["name"] + "."
        tensors = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
        cases.append(case | {"input": tensors.pop("input"), "decoded": tensors.pop("decoded", None)})
        cases[-1]["tensors"] = tensors
    return cases


def read_safetensors(raw: bytes) -> dict[str, np.ndarray]:
    """Name -> array: 8 bytes hold the length of the header, which is JSON, and the tensors follow it."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = raw[start + first : start + last]
        arrays[name] = np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def as_float32(array: np.ndarray) -> np.ndarray:
    """The numbers of an `input` or `decoded`: uint16 bits of bf16 are the upper half of a float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
