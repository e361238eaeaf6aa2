"""Look into a checkpoint of 4 GB in 4 bits: seconds and memory of each look.

    python bench/xray.py                     write the file, measure, write xray.json; some minutes, 8.4 GB of disk
    python bench/xray.py --quick --out FILE  a file of 40 MB: to see that it runs

The file has the shape of Llama-2-7B and random bytes. Each look runs in a process of its own. Memory is the rise of
resident memory, mapped pages included, above what imports take and a first look at a file of 2 MB, which
loads the rest of them. "cold": the file is not in the system's memory.
Nothing here asserts a time.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import write  # noqa: E402
from bench.timing import cpu_name, peak_bytes  # noqa: E402

LAYERS = 32
WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
SHAPES = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
SHAPES |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
LOOKS = ("open", "open and explain a byte", "open and check all constants", "compare with a copy")


def tensors(shrink: int) -> dict:
    """Name -> (dtype, shape, content or None for random bytes) of every stored tensor, as bitsandbytes names them."""
    from qlora_lab.quant.codebook import codebook

    found = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, WIDTH // shrink), None)}
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    levels = codebook("nf4").numpy().tobytes()
    for layer in range(LAYERS):
        for part, (out, in_) in SHAPES.items():
            key = f"model.layers.{layer}.{part}.weight"
            shape = out, in_ // shrink
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
            text = json.dumps(state).encode()
            numel = shape[0] * shape[1]
            found[key] = "U8", (numel // 2, 1), None
            found[f"{key}.absmax"] = "F32", (numel // 64,), "constants"
            found[f"{key}.quant_map"] = "F32", (16,), levels
            found[f"{key}.quant_state.bitsandbytes__nf4"] = "U8", (len(text),), text
    return found


def write_checkpoint(path: Path, shrink: int, seed: int = 0) -> None:
    """Write the file in order, a piece of random bytes at a time."""
    import numpy as np

    from qlora_lab.files.tensor_header import BITS

    draws = np.random.default_rng(seed)
    header = {}
    end = 0
    for name, (dtype, shape, _) in tensors(shrink).items():
        start, end = end, end + int(np.prod(shape)) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, shape, content) in tensors(shrink).items():
            start, end = header[name]["data_offsets"]
            if content is None:
                file.write(draws.bytes(end - start))
            elif content == "constants":
                file.write(draws.random(shape, dtype=np.float32).tobytes())
            else:
                file.write(content)
        file.flush()
        os.fsync(file.fileno())


def look(kind: str, path: Path, copy: Path, *small: Path) -> dict:
    """Measure one look: seconds, and bytes above the imports."""
    from qlora_lab.export.xray import Checkpoint, byte_at, scanned
    from qlora_lab.export.xray_diff import compare

    def act(path: Path, copy: Path) -> None:
        checkpoint = Checkpoint(path)
        if kind == LOOKS[1]:
            byte_at(checkpoint, next(iter(checkpoint.tensors)), 12)
        if kind == LOOKS[2]:
            scanned(checkpoint, progress=False)
        if kind == LOOKS[3]:
            compare(checkpoint, Checkpoint(copy), progress=False)

    seconds = []

    def timed() -> None:
        start = perf_counter()
        act(path, copy)
        seconds.append(perf_counter() - start)

    act(*small)
    return {"bytes": peak_bytes(timed), "seconds": seconds[0]}


def forget(*paths: Path) -> None:
    """Let the system drop its copies of the files."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, shrink: int) -> dict:
    path, copy = folder / "model.safetensors", folder / "copy.safetensors"
    small = [folder / "small.safetensors", folder / "other.safetensors"]
    for seed, one in enumerate(small):
        write_checkpoint(one, 4096, seed)
    write_checkpoint(path, shrink)
    with path.open("rb") as source, copy.open("wb") as target:
        while piece := source.read(2**24):
            target.write(piece)
        target.seek(-(2**20), os.SEEK_END)
        target.write(os.urandom(2**10))  # so that something differs
        target.flush()
        os.fsync(target.fileno())
    looks = {}
    for state in ("cold", "warm"):
        for kind in LOOKS:
            if state == "cold":
                forget(path, copy)
            command = [sys.executable, __file__, "--look", kind, *map(str, (path, copy, *small))]
            looks[f"{kind}, {state}"] = json.loads(subprocess.check_output(command, text=True))
    return {"file_bytes": path.stat().st_size, "looks": looks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small file, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "xray.json", help="where the figures go")
    parser.add_argument("--look", nargs=5, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.look:
        print(json.dumps(look(a.look[0], *map(Path, a.look[1:]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), 128 if a.quick else 1)
    about = {"processor": cpu_name(), "date": datetime.date.today().isoformat()}
    about["load"] = os.getloadavg()[0]  # processes that wanted the processor in the last minute: others work here, too
    write(a.out, json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
