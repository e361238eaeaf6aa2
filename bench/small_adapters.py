"""Merge adapters that change almost nothing into SmolLM2-135M: what the report says of each, and its verdict.

    python bench/small_adapters.py                        writes small_adapters.json; some minutes
    python bench/small_adapters.py --sizes 2e-4 --out FILE

The adapters are random, of rank 16 on all linear layers: lora_A as it is before training, lora_B normal with the
standard deviation of each size.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.files import write  # noqa: E402
from qlora_lab.adapters.lora import lora_layers  # noqa: E402
from qlora_lab.export.merge_folders import Folders, merge_folders  # noqa: E402

MODEL = "smollm2-135m"
R = 16
SIZES = (2e-4, 1e-5, 1e-7)
TARGETS = ("requantised", "dequantised")
FIGURES = ("adapter_kl", "kl", "base_kl", "rounding_kl", "arrived", "verdict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--out", default=str(HERE / "small_adapters.json"))
    a = parser.parse_args()
    result = {"date": datetime.date.today().isoformat(), "model": MODEL, "r": R, "torch": torch.__version__}
    result["merges"] = []
    for size in a.sizes:
        result["merges"] += of_size(size)
    write(Path(a.out), json.dumps(result, indent=1) + "\n")
    for row in result["merges"]:
        print(row)


def of_size(size: float) -> list[dict]:
    """Draw an adapter, and merge it for each target."""
    rows = []
    with tempfile.TemporaryDirectory() as home:
        scratch = Path(home)
        draw(scratch / "adapter", size)
        for target in TARGETS:
            folders = Folders(MODEL, scratch / "adapter")
            figures = merge_folders(folders, scratch / target, target, anyway=True, progress=False).figures()
            rows.append({"size": size, "target": target} | {name: figures[name] for name in FIGURES})
    return rows


def draw(folder: Path, size: float) -> None:
    model, _ = ql.load(MODEL, progress=False)
    torch.manual_seed(0)
    ql.add_lora(model, r=R, alpha=R)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=size)
    ql.save_adapter(model, folder)


if __name__ == "__main__":
    main()
