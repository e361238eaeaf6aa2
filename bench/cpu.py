"""Time ours, bitsandbytes and torchao on the CPU, in turn in one process: `make bench`, a quarter of an hour.

    python bench/cpu.py              measure with both allocators, write cpu.json, cpu.png, part of docs/speed.md
    python bench/cpu.py --quick      toy sizes, two rounds, writes to --out only: to see that it runs
    python bench/cpu.py --render     do not measure: picture, section and table from cpu.json

Each run draws new weights. A figure is the median of `rounds` samples; low and high are quartiles. Ratios are their
time over ours. Floors are measured in the same run: a fill of the same output, a copy, a product with a ready weight.
Nothing here asserts a time.
"""

import argparse
import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import write  # noqa: E402
from bench.render import render  # noqa: E402
from bench.timing import cpu_name, in_turn, peak_bytes  # noqa: E402
from qlora_lab.adapters.lora import add_lora  # noqa: E402
from qlora_lab.kernels import product  # noqa: E402
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears  # noqa: E402
from qlora_lab.quant.quantize import dequantize, quantize  # noqa: E402
from qlora_lab.train.allocator import recycle_memory  # noqa: E402

SIZES = [(576, 576), (576, 1536), (4096, 4096), (11008, 4096)]
LARGE = 4096 * 4096
ALLOCATORS = ("stock", "recycling")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def bitsandbytes():
    import bitsandbytes.nn

    return bitsandbytes


def bnb_linear(linear: nn.Linear, dtype: torch.dtype, training: bool = True) -> nn.Module:
    """The same weight as a layer of bitsandbytes: NF4, block size 64, double quantization."""
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    weight = linear.weight.detach().clone()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").train(training)


class Bench:
    """Measures, and collects rows."""

    def __init__(self, quick: bool, allocator: str):
        self.quick = quick
        self.allocator = allocator
        self.rows = []
        self.rounds, self.sample = (2, 0.0) if quick else (9, 5e-3)

    def row(self, work: str, contenders: dict, shape: tuple, **facts) -> None:
        seconds = in_turn(contenders, self.rounds, self.sample)
        self.rows.append({"work": work, "shape": list(shape), **facts, "seconds": seconds})
        ours = seconds["ours"]["median"]
        ratios = ", ".join(f"{n} {s['median'] / ours:.2f}" for n, s in seconds.items() if n != "ours")
        print(f"{self.allocator:9} {work:22} {str(shape):14} {facts} ours {ours * 1e3:.3f} ms; x {ratios}", flush=True)

    def sizes(self) -> list[tuple[int, int]]:
        return [(32, 64), (64, 128)] if self.quick else SIZES

    def quantise(self) -> None:
        for shape in self.sizes():
            for dtype in NAMES:
                weight = (0.02 * torch.randn(shape)).to(dtype)
                contenders = {
                    "ours": partial(quantize, weight, "nf4", 64, True),
                    "bitsandbytes": partial(bnb_quantize, weight),
                    "copy": partial(torch.empty_like(weight).copy_, weight),
                }
                if torchao_takes(weight) and dtype == torch.float32:
                    contenders["torchao"] = partial(to_nf4(), weight, 64, 256)
                self.row("quantise", contenders, shape, dtype=NAMES[dtype])

    def dequantise(self) -> None:
        for shape in self.sizes():
            for dtype in NAMES:
                weight = (0.02 * torch.randn(shape)).to(dtype)
                q = quantize(weight, "nf4", 64, True)
                packed, state = bnb_quantize(weight)
                out = weight.clone()
                contenders = {
                    "ours": partial(dequantize, q, out=out),
                    "ours, fresh output": partial(dequantize, q),
                    "bitsandbytes": partial(bitsandbytes().functional.dequantize_4bit, packed, state),
                    "fill": partial(out.fill_, 1.0),
                }
                if torchao_takes(weight):
                    contenders["torchao"] = to_nf4()(weight, 64, 256).get_original_weight
                self.row("dequantise", contenders, shape, dtype=NAMES[dtype])

    def few_tokens(self) -> None:
        for shape in [(64, 128)] if self.quick else SIZES[1:]:
            linear = nn.Linear(shape[1], shape[0], False)
            ours = Linear4bit(quantize(linear.weight, "nf4", 64, True))
            for dtype in NAMES:
                train = bnb_linear(linear, dtype)
                packed = bnb_linear(linear, dtype, training=False)
                ready = linear.weight.detach().to(dtype)
                for tokens in (1, 8, 16):
                    x = torch.randn(tokens, shape[1], dtype=dtype)
                    contenders = {
                        "ours": partial(ours, x),
                        "bitsandbytes": partial(train, x),
                        "bitsandbytes, eval": partial(packed, x),
                        "ready weight": partial(torch.mm, x, ready.t()),
                    }
                    with torch.no_grad():
                        self.row("forward", contenders, shape, dtype=NAMES[dtype], tokens=tokens)

    def linear(self) -> None:
        cases = [
            ((576, 1536), 256),
            ((576, 1536), 2048),
            ((4096, 4096), 256),
            ((4096, 4096), 2048),
            ((11008, 4096), 256),
        ]
        for shape, tokens in [((64, 128), 20)] if self.quick else cases:
            linear = nn.Linear(shape[1], shape[0], False)
            ours = Linear4bit(quantize(linear.weight, "nf4", 64, True))
            for dtype in NAMES:
                theirs = bnb_linear(linear, dtype)
                dense = copy.deepcopy(linear).to(dtype).requires_grad_(False)
                x = torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True)
                grad = torch.randn(tokens, shape[0], dtype=dtype)
                layers = {"ours": ours, "bitsandbytes": theirs, "ready weight": dense}
                facts = {"dtype": NAMES[dtype], "tokens": tokens}
                steps = {name: partial(forward_backward, layer, x, grad) for name, layer in layers.items()}
                if self.allocator == "stock":
                    facts["peak_bytes"] = peaks(steps)
                self.row("forward and backward", steps, shape, **facts)
                with torch.no_grad():
                    forward = {name: partial(layer, x.detach()) for name, layer in layers.items()}
                    self.row("forward", forward, shape, dtype=NAMES[dtype], tokens=tokens)

    def lora_layer(self) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        hidden, inner, heads, tokens = (64, 128, 4, 20) if self.quick else (4096, 11008, 32, 256)
        config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads)
        config._attn_implementation = "sdpa"
        for dtype in NAMES:
            dense = LlamaDecoderLayer(config, 0).to(dtype)
            layers = {"ours": quantize_linears(copy.deepcopy(dense)), "bitsandbytes": copy.deepcopy(dense)}
            for name, module in list(layers["bitsandbytes"].named_modules()):
                if type(module) is nn.Linear:
                    layers["bitsandbytes"].set_submodule(name, bnb_linear(module, dtype))
            layers["unquantised"] = dense
            x = torch.randn(1, tokens, hidden, dtype=dtype, requires_grad=True)
            position = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
            steps = {}
            for name, layer in layers.items():
                add_lora(layer, 16)  # whichever library its linear layers come from
                optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-4)
                steps[name] = partial(train_step, layer, optimizer, x, position)
            self.row("LoRA layer step", steps, (hidden, inner), dtype=NAMES[dtype], tokens=tokens)

    def growth(self) -> None:
        for exponent in (8, 10) if self.quick else range(16, 29, 2):
            weight = 0.02 * torch.randn(2**exponent)
            packed, state = bnb_quantize(weight)
            q = quantize(weight, "nf4", 64, True)
            out = torch.empty_like(weight)
            shape = (2**exponent,)
            contenders = {
                "ours": partial(quantize, weight, "nf4", 64, True),
                "bitsandbytes": partial(bnb_quantize, weight),
            }
            back = {
                "ours": partial(dequantize, q, out=out),
                "bitsandbytes": partial(bitsandbytes().functional.dequantize_4bit, packed, state),
                "fill": partial(out.fill_, 1.0),
            }
            if torchao_takes(weight) and exponent <= 22:
                contenders["torchao"] = partial(to_nf4(), weight, 64, 256)
                back["torchao"] = to_nf4()(weight, 64, 256).get_original_weight
            self.row("quantise, growth", contenders, shape, dtype="float32")
            self.row("dequantise, growth", back, shape, dtype="float32")

    def run(self) -> list[dict]:
        self.quantise()
        self.dequantise()
        self.few_tokens()
        self.linear()
        self.lora_layer()
        if self.allocator == "stock":
            self.growth()
        return self.rows


def bnb_quantize(weight: torch.Tensor):
    return bitsandbytes().functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def torchao_takes(weight: torch.Tensor) -> bool:
    """Whether torchao is there: it needs whole groups of 256 blocks, and over a second for a large weight."""
    return find_spec("torchao") is not None and weight.numel() % (64 * 256) == 0 and weight.numel() <= LARGE


def to_nf4():
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4


def forward_backward(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    x.grad = None
    layer(x).backward(grad)


def peaks(steps: dict) -> dict[str, int | None]:
    for step in steps.values():
        step()
    vars(product._local).clear()  # so that the peak includes the panel
    return {name: peak_bytes(step) for name, step in steps.items()}


def train_step(layer: nn.Module, optimizer, x: torch.Tensor, position) -> None:
    y = layer(x, position_embeddings=position)
    (y[0] if isinstance(y, tuple) else y).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


COLD = """
import sys, time
start = time.perf_counter()
{code}
print(time.perf_counter() - start)
"""
IMPORTS = {
    "import torch": "import torch",
    "import qlora_lab": "import qlora_lab",
    "import numba, after torch": "import numba",
    "import bitsandbytes, after torch": "import bitsandbytes",
    "import torchao, after torch": "import torchao",
}
FIRST_CALLS = {
    "first quantise": "from qlora_lab.quant.quantize import *; q = quantize(torch.randn(576, 1536), 'nf4', 64, True)",
    "first dequantise": "dequantize(q)",
    "first product of 1 token": "from qlora_lab.kernels.product import *; forward(torch.randn(1, 1536), q.plain, 576)",
    "first product of 256 tokens": "forward(torch.randn(256, 1536), q.plain, 576)",
}


def cold_start() -> dict[str, float | list[float]]:
    """Seconds of imports in a fresh process, and of first calls: [compiling, from the cache on disk]."""
    seconds = {}
    for name, code in IMPORTS.items():
        if find_spec(code.split()[1]) is None:
            continue
        setup = "import torch\n" if "after torch" in name else ""
        seconds[name] = _fresh(setup + COLD.format(code=code))[0]
    calls = "".join(COLD.format(code=code) for code in FIRST_CALLS.values())
    with tempfile.TemporaryDirectory() as folder:
        runs = [_fresh("import torch\n" + calls, NUMBA_CACHE_DIR=folder) for _ in range(2)]
    return seconds | {name: list(times) for name, *times in zip(FIRST_CALLS, *runs, strict=True)}


def _fresh(code: str, **environment: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        cwd=HERE.parent,
    )  # fmt: skip
    return [float(line) for line in done.stdout.split()]


def versions() -> dict[str, str]:
    installed = {}
    for name in ("torch", "numba", "llvmlite", "bitsandbytes", "torchao", "transformers"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds; docs/speed.md stays as it is")
    parser.add_argument("--render", action="store_true", help="do not measure: read the JSON file")
    parser.add_argument("--out", type=Path, default=HERE / "cpu.json", help="JSON file (default: bench/cpu.json)")
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)  # one half of a run
    args = parser.parse_args()
    if args.allocator:
        if args.allocator == "recycling" and not recycle_memory():
            sys.exit("this C library cannot recycle memory: only glibc can")
        rows = Bench(args.quick, args.allocator).run()
        args.out.write_text(json.dumps(rows))
        return
    if not args.render:
        if args.quick and args.out == HERE / "cpu.json":
            parser.error("--quick measures nothing worth keeping: give --out FILE")
        result = {
            "date": datetime.date.today().isoformat(),
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "cold_start": cold_start(),
            "allocators": {name: _half(args, name) for name in ALLOCATORS},
        }
        write(args.out, json.dumps(result, indent=1) + "\n")
    render(args.out, None if args.quick else HERE.parent / "docs" / "speed.md")


def _half(args: argparse.Namespace, allocator: str) -> list[dict]:
    """Measure in a process of its own, because the allocator cannot be changed back."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        command = [sys.executable, "-W", "ignore", __file__, "--allocator", allocator, "--out", str(part)]
        subprocess.run(command + ["--quick"] * args.quick, check=True)
        return json.loads(part.read_text())


if __name__ == "__main__":
    main()
