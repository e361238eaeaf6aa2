"""Measure a merge of a LLaMA with 7B parameters, folder to folder, on this machine: memory, and time beside the disk's.

    python bench/seven_b_merge.py                        writes seven_b_merge.json; needs 30 GB of disk for a while
    python bench/seven_b_merge.py --layers 2 --out FILE  the same matrices in fewer layers: to see that it runs
    python bench/seven_b_merge.py --targets requantised  these targets only (default: dequantised)

The model and the adapter (rank 16, all linear layers) have random weights, drawn layer by layer. The merge runs in a
process of its own. Its peak is the highest resident set, pages of mapped files included, minus that after the imports
and a merge of a toy. `weights` is the pass that reads, merges and writes all of them. The floor reads the same bytes
and writes and syncs those of the result, without computing. The answers of the base, the adapter model and the merged
one are computed beside that: 384 tokens each, in float32.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.seven_b import SHAPE, TOY, write_checkpoint  # noqa: E402
from qlora_lab.train.resident import peak_resident, reset_peak, resident  # noqa: E402

SHARD = 10**9  # bytes
R = 16
GIB = 2**30
OUT = HERE / "seven_b_merge.json"


def write_adapter(folder: Path, model: Path, std: float = 0.01) -> None:
    """Write a random adapter of all linear layers in PEFT's format. std: of the values of lora_A and lora_B."""
    import torch
    from safetensors.torch import save_file

    from qlora_lab.model.empty_model import empty_model
    from qlora_lab.model.load import layer_sizes

    empty = empty_model(model, torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path in layer_sizes(empty):
        out_features, in_features = empty.get_submodule(path).weight.shape
        for name, size in (("lora_A", (R, in_features)), ("lora_B", (out_features, R))):
            drawn = torch.randn(size, generator=generator).mul_(std)
            tensors[f"base_model.model.{path}.{name}.weight"] = drawn
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": "all-linear", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def stage(scratch: Path, target: str) -> dict:
    """Merge a toy, so that all is imported and compiled, then the model."""
    from qlora_lab.export import merge

    _merge(scratch / "toy", scratch / "toy adapter", scratch / f"toy {target}", target)
    seconds = {"weights": 0.0, "answers": 0.0}
    merge._write_weights = _timed(merge._write_weights, seconds, "weights")
    before = resident()
    reset_peak()
    start = time.perf_counter()
    out = scratch / "merged"
    parity = _merge(scratch / "original", scratch / "adapter", out, target)
    total = time.perf_counter() - start
    peak = peak_resident() - before
    size = sum(path.stat().st_size for path in out.iterdir())
    return {
        "peak_bytes_above_import": peak,
        "seconds": total,
        "seconds_of_weights": seconds["weights"],
        "seconds_of_floor": _floor(scratch / "original", out),
        "bytes_read": sum(path.stat().st_size for path in (scratch / "original").iterdir()),
        "bytes_written": size,
        "kl": parity.kl,
        "adapter_kl": parity.adapter_kl,
    }


def _merge(model: Path, adapter: Path, out: Path, target: str):
    from qlora_lab.export.merge_folders import Folders, merge_folders

    return merge_folders(Folders(model, adapter), out, target, anyway=True, progress=False)


def _timed(function, seconds: dict, name: str):
    def timed(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] += time.perf_counter() - start
        return result

    return timed


def _floor(original: Path, merged: Path) -> float:
    """Seconds to read the model's files, and to write and sync as many bytes as the merge did."""
    size = sum(path.stat().st_size for path in merged.iterdir())
    shutil.rmtree(merged)  # there may be no room for both
    start = time.perf_counter()
    for path in sorted(original.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
            while file.read(2**24):
                pass
    piece = os.urandom(2**24)
    with (merged.parent / "floor").open("wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (merged.parent / "floor").unlink()
    return seconds


def measure(scratch: Path, shape: dict, targets: list[str]) -> dict:
    for name, sizes in (("toy", TOY), ("original", shape)):
        (scratch / name).mkdir()
        write_checkpoint(scratch / name, sizes, SHARD)
        write_adapter(scratch / {"toy": "toy adapter", "original": "adapter"}[name], scratch / name)
    results = {}
    for target in targets:
        command = [sys.executable, __file__, "--stage", target, "--scratch", str(scratch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{target} failed with exit code {done.returncode}: its message is above")
        results[target] = json.loads(done.stdout.splitlines()[-1])
        print(target, results[target], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--targets", nargs="+", default=["dequantised"])
    parser.add_argument("--scratch", type=Path, help="a folder with room for 30 GB; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.stage:
        print(json.dumps(stage(a.scratch, a.stage)))
        return
    scratch = Path(tempfile.mkdtemp(prefix="seven-b-merge-", dir=a.scratch))
    try:
        results = measure(scratch, SHAPE | {"num_hidden_layers": a.layers}, a.targets)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    from bench.cpu import versions
    from bench.files import write
    from bench.timing import cpu_name

    head = {"date": datetime.date.today().isoformat(), "machine": cpu_name(), "versions": versions()}
    head |= {"model": "random weights", "layers": a.layers, "rank": R}
    write(a.out, json.dumps(head | {"targets": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
