"""Check the Triton rungs on a GPU, then time them beside bitsandbytes and torchao.

    python bench/gpu.py                     a few minutes; writes gpu-<device>.json and the table of bench/README.md
    python bench/gpu.py --quick --out FILE  toy sizes: to see that it runs, also with TRITON_INTERPRET=1 and no GPU
    python bench/gpu.py --render            do not measure: write only the table

Exit code 1: a rung differs from its twin; the difference is printed, and nothing is measured. 2: there is no GPU.
A figure is the median of `rounds` samples; low and high are quartiles. Each sample begins with a cold L2. Its share is
the floor over the median. The floor is bytes that must be moved over the bandwidth of a copy, or operations over the
rate of a matrix product, whichever takes longer, both measured in the same run. "call" is the time of one call among
many back to back, with warm caches and with the host's part. Nothing here asserts a time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import ceil, inf, prod
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

if __name__ == "__main__" and find_spec("triton") is None:
    print("Triton is not installed, and the GPU kernels are written in it. It exists only for Linux.", file=sys.stderr)
    sys.exit(2)

from bench.cpu import bitsandbytes, forward_backward, to_nf4  # noqa: E402
from bench.files import between, write  # noqa: E402
from bench.gpu_card import machine, refusal, rungs_on, slug, the_device  # noqa: E402
from bench.gpu_check import HALVES, NAMES, Differs, adamw_tables, check, first_line, readable  # noqa: E402
from bench.render import PEER, find, seconds as shown  # noqa: E402
from qlora_lab.kernels.triton.adamw_8bit import adamw_8bit  # noqa: E402
from qlora_lab.kernels.triton.dequantize_double import dequantize_double  # noqa: E402
from qlora_lab.kernels.triton.dequantize_nf4 import dequantize_nf4  # noqa: E402
from qlora_lab.kernels.triton.double_quantize import double_dequantize, double_quantize  # noqa: E402
from qlora_lab.kernels.triton.gemv_nf4 import MAX_TOKENS, gemv_nf4  # noqa: E402
from qlora_lab.kernels.triton.matmul_nf4 import matmul_nf4  # noqa: E402
from qlora_lab.kernels.triton.matmul_nf4_backward import matmul_nf4_backward  # noqa: E402
from qlora_lab.kernels.triton.quantize_nf4 import quantize_nf4  # noqa: E402
from qlora_lab.measure.latency import orders  # noqa: E402
from qlora_lab.model.linear4bit import Linear4bit  # noqa: E402
from qlora_lab.optim import adamw_8bit as readable_adamw  # noqa: E402
from qlora_lab.quant import double_quant  # noqa: E402
from qlora_lab.quant.blocks import TINY  # noqa: E402
from qlora_lab.quant.codebook import midpoints, rounding  # noqa: E402
from qlora_lab.quant.quantize import (  # noqa: E402
    QuantizedTensor,
    dequantize,
    quantize,
    quantize_blocks,
)

SIZES = [(4096, 4096), (576, 1536), (11008, 4096)]
TOKENS = (1, 8, 64, 256, 2048)
ROWS = 30 * len(SIZES)  # of a full bench
LEAST = 3  # rounds of a row, even if time is short
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
SHOWN = {  # column of bench/README.md -> work, shape, tokens
    "dequantise 4096 x 4096": ("dequantize_double", (4096, 4096), None),
    "layer 4096 x 4096, forward, 1 token": ("layer forward", (4096, 4096), 1),
    "forward and backward, 2048 tokens": ("layer forward and backward", (4096, 4096), 2048),
}


# ----------------------------------------------------------------------------------------------------------------- time


class Bench:
    """Measures on one device, and collects rows.

    seconds: the limit for all rows. Each row gets its share of the time left, with fewer rounds if that is short; rows
    that would start after the limit are left out.
    """

    def __init__(self, device: torch.device, quick: bool, seconds: float = inf):
        self.device = device
        self.quick = quick
        self.rows = []
        self.left_out = []
        self.rounds = 2 if quick else 25
        self.end = perf_counter() + seconds
        self.row_end = inf
        self.on_gpu = device.type == "cuda"
        bf16 = not self.on_gpu or torch.cuda.get_device_capability(device) >= (8, 0)  # else it is emulated
        self.half = HALVES[not bf16]
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        self.cold = self.empty(max(2**28, 4 * l2) if self.on_gpu else 2**10, torch.uint8)
        self.fills = 1
        self.bandwidth = self._bandwidth()
        self.rate = self._rate()
        # the host must be ahead when the clock starts, so the caches are overwritten for a millisecond at least
        self.fills = ceil(1e-3 * self.bandwidth / len(self.cold))

    def empty(self, shape: int | tuple, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.half)

    def _bandwidth(self) -> float:
        """Bytes per second of a copy, read and written."""
        target, source = (self.empty(2**16 if self.quick else 2**29, torch.uint8) for _ in range(2))
        return 2 * len(target) / self.measure({"copy": lambda: partial(target.copy_, source)})["copy"]["median"]

    def _rate(self) -> float:
        """Operations per second of a square matrix product."""
        n = 64 if self.quick else 8192
        a, b = self.randn(n, n), self.randn(n, n)
        return 2 * n**3 / self.measure({"product": lambda: partial(torch.mm, a, b)})["product"]["median"]

    def sample(self, function: Callable[[], object]) -> float:
        """Seconds of one call with cold caches, by the device, or by the clock if Triton interprets."""
        if not self.on_gpu:
            return self.call(function, 1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.fills):
            self.cold.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def call(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call of many calls back to back, until the device has finished the last one."""
        start = perf_counter()
        for _ in range(calls):
            function()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return (perf_counter() - start) / calls

    def measure(self, contenders: dict[str, Callable]) -> dict[str, dict]:
        """name -> {median, low, high, call, in seconds; rounds}, or {error}. A contender makes what is then timed."""
        times = {}
        ready = {}
        for name, make in contenders.items():
            try:
                times[name] = {"error": "not installed"}
                if name not in (PEER, "torchao") or find_spec(name):
                    function = make()
                    once = [self.sample(function) for _ in range(1 if self.quick else 3)][-1]
                    ready[name] = function, min(100, ceil(5e-3 / once)) if self.on_gpu else 1, [], []
            except Exception as error:  # a library may raise anything for an input that it does not accept
                times[name] = {"error": first_line(error)}
        for i, order in enumerate(orders(ready, self.rounds)):
            if i >= LEAST and perf_counter() > self.row_end:
                break
            for name in order:
                function, calls, cold, warm = ready[name]
                cold.append(self.sample(function))
                warm.append(self.call(function, calls) if self.on_gpu else cold[-1])
        for name, (*_, cold, warm) in ready.items():
            low, median, high = statistics.quantiles(cold, n=4, method="inclusive")
            call = statistics.median(warm)
            times[name] = {"median": median, "low": low, "high": high, "call": call, "rounds": len(cold)}
        return times

    def row(
        self,
        work: str,
        shape: tuple,
        dtype: torch.dtype,
        contenders: dict,
        moved: int,
        tokens: int = 0,
        products: int = 0,
    ) -> None:
        """Measure, and keep. moved: bytes that must move; products: half the operations per weight and token."""
        facts = {"work": work, "shape": list(shape), "dtype": NAMES[dtype]} | ({"tokens": tokens} if tokens else {})
        print(*facts.values(), file=sys.stderr, flush=True)
        left = self.end - perf_counter()
        if left <= 0:
            self.left_out.append(facts)
            return
        self.row_end = perf_counter() + left / max(1, ROWS - len(self.rows))
        operations = 2 * products * prod(shape) * tokens
        floor = max(moved / self.bandwidth, operations / self.rate)
        seconds = self.measure(contenders)
        for times in seconds.values():
            if "median" in times:
                times["share"] = floor / times["median"]
        self.rows.append(facts | {"moved": moved, "operations": operations, "floor": floor, "seconds": seconds})

    def blocks(self, shape: tuple[int, int]) -> None:
        """Rungs 1 to 4. torchao always quantises constants too, so it is compared with rungs 1 and 3."""
        weight = 0.02 * self.randn(*shape, dtype=torch.float32)
        single, double = (readable(quantize, weight, "nf4", 64, yes) for yes in (False, True))
        flat = weight.view(-1).to(self.half)
        thresholds, order = rounding(single.levels)
        self.row("quantize_nf4", shape, self.half, {
            "ours": lambda: partial(quantize_nf4, flat, thresholds, order, 64, TINY),
            PEER: lambda: partial(bnb_quantize, flat, False),
            "torchao": lambda: partial(nf4_of, flat.view(shape)),
            "readable": lambda: partial(readable, quantize_blocks, flat, single.levels, 64),
        }, flat.nbytes + single.nbytes)  # fmt: skip
        for dtype in (self.half, torch.float32):
            self.dequantise(dequantize_nf4, single, weight.to(dtype))
            self.dequantise(dequantize_double, double, weight.to(dtype))
        absmax = single.constants
        constants = double.constants
        moved = single.constants.nbytes + double.constants.nbytes
        offset = constants.absmax_offset
        limits = midpoints(double_quant.dynamic_map()).to(self.device)
        self.row("double_quantize", shape, torch.float32, {
            "ours": lambda: partial(double_quantize, absmax, offset, limits, 256, TINY),
            PEER: lambda: partial(bnb_constants, absmax, offset),
            "readable": lambda: partial(readable, double_quant.double_quantize, absmax),
        }, moved)  # fmt: skip
        self.row("double_dequantize", shape, torch.float32, {
            "ours": lambda: partial(double_dequantize, constants.plain),
            PEER: lambda: partial(bnb_absmax, *bnb_constants(absmax, offset), offset),
            "readable": lambda: partial(readable, double_quant.double_dequantize, constants),
        }, moved)  # fmt: skip

    def dequantise(self, rung: Callable, q: QuantizedTensor, weight: torch.Tensor) -> None:
        out = torch.empty_like(weight)
        stored = q.plain.constants
        contenders = {
            "ours": lambda: partial(rung, q.packed, stored, q.levels, 64, out),
            PEER: lambda: partial(bitsandbytes().functional.dequantize_4bit, *bnb_quantize(weight, q.double_quant)),
            "torchao": lambda: nf4_of(weight).get_original_weight,
            "readable": lambda: partial(readable, dequantize, q, None, out),
            "fill": lambda: partial(out.fill_, 1.0),
        }
        if not q.double_quant:
            del contenders["torchao"]
        self.row(rung.__name__, tuple(weight.shape), weight.dtype, contenders, q.nbytes + out.nbytes)

    def products(self, shape: tuple[int, int]) -> None:
        linear = nn.Linear(shape[1], shape[0], False, device=self.device).to(self.half).requires_grad_(False)
        q = readable(quantize, linear.weight, "nf4", 64, True)
        theirs = tried(bnb_linear, linear) if find_spec(PEER) else None
        torchaos = tried(nf4_of, linear.weight) if find_spec("torchao") else None
        for tokens in (1, 20) if self.quick else TOKENS:
            self.product(linear, q, theirs, torchaos, tokens)

    def product(self, linear: nn.Linear, q: QuantizedTensor, theirs: object, torchaos: object, tokens: int) -> None:
        """Rungs 5 to 7, and the layer, whose kernels choose() picks."""
        rows, columns = q.shape
        ours = Linear4bit(q)
        ready = linear.weight
        x, grad = self.randn(tokens, columns), self.randn(tokens, rows)
        leaf = x.clone().requires_grad_()
        moved = q.nbytes + x.nbytes + grad.nbytes
        forward = {
            PEER: lambda: partial(unless_failed(theirs), x),
            "torchao": lambda: partial(linear_nf4, x, unless_failed(torchaos)),
            "readable": lambda: lambda: x @ readable(dequantize, q).t(),
            "ready weight": lambda: partial(torch.mm, x, ready.t()),
        }
        backward = {
            "ours": lambda: partial(matmul_nf4_backward, grad, q.plain, columns),
            PEER: lambda: lambda: grad @ bnb_weight(unless_failed(theirs)),
            "torchao": lambda: lambda: grad @ unless_failed(torchaos).get_original_weight(),
            "readable": lambda: lambda: grad @ readable(dequantize, q),
            "ready weight": lambda: partial(torch.mm, grad, ready),
        }
        both = {
            "ours": lambda: partial(forward_backward, ours, leaf, grad),
            PEER: lambda: partial(forward_backward, unless_failed(theirs), leaf, grad),
            "torchao": lambda: partial(
                forward_backward, partial(linear_nf4, weight=unless_failed(torchaos)), leaf, grad
            ),
            "readable": lambda: partial(readable, forward_backward, ours, leaf, grad),
            "ready weight": lambda: partial(forward_backward, linear, leaf, grad),
        }
        rung5, rung6 = (lambda rung=rung: partial(rung, x, q.plain, rows) for rung in (gemv_nf4, matmul_nf4))
        with torch.no_grad():
            if tokens <= MAX_TOKENS:
                self.row("gemv_nf4", q.shape, self.half, {"ours": rung5} | forward, moved, tokens, 1)
            self.row("matmul_nf4", q.shape, self.half, {"ours": rung6} | forward, moved, tokens, 1)
            self.row("matmul_nf4_backward", q.shape, self.half, backward, moved, tokens, 1)
            layer = {"ours": lambda: partial(ours, x)}
            self.row("layer forward", q.shape, self.half, layer | forward, moved, tokens, 1)
        self.row("layer forward and backward", q.shape, self.half, both, 2 * moved, tokens, 2)

    def adamw(self, shape: tuple[int, int]) -> None:
        """Rung 8."""
        n = prod(shape)
        adamw = readable_adamw.AdamW(3, 1e-4)
        tables = [t.to(self.device) for t in adamw_tables()]
        param, grad = self.randn(n), self.randn(n)
        state = [self.empty(n, torch.uint8).zero_(), self.empty(ceil(n / 256), torch.float32).zero_()] * 2
        mine, twins, peers = ([t.clone() for t in (param, *state)] for _ in range(3))

        def theirs() -> Callable:
            functional = bitsandbytes().functional
            maps = [functional.create_dynamic_map(signed=signed).to(self.device) for signed in (True, False)]
            p, codes1, scale1, codes2, scale2 = peers
            update = functional.optimizer_update_8bit_blockwise
            return lambda: update(
                "adam", grad, p, codes1, codes2, adamw.beta1, adamw.beta2, 0.0, 0.0, adamw.eps, adamw.step, adamw.lr,
                *maps, scale1, scale2,
            )  # fmt: skip

        def torchaos() -> Callable:
            from torchao.optim import AdamW8bit

            leaf = nn.Parameter(param.clone())
            leaf.grad = grad
            return AdamW8bit([leaf], lr=adamw.lr).step

        moments = readable_adamw.Moments(*twins[1:])
        self.row("adamw_8bit", shape, self.half, {
            "ours": lambda: partial(adamw_8bit, mine[0], grad, *mine[1:], tuple(tables), adamw.scalars, TINY),
            PEER: theirs,
            "torchao": torchaos,
            "readable": lambda: partial(readable_adamw.adamw_8bit, twins[0], grad, moments, adamw),
        }, 3 * param.nbytes + 2 * sum(t.nbytes for t in state))  # fmt: skip

    def run(self) -> list[dict]:
        for shape in [(64, 128)] if self.quick else SIZES:
            self.blocks(shape)
            self.products(shape)
            self.adamw(shape)
        return self.rows


# -------------------------------------------------------------------------------------------------------------- peers


def tried(make: Callable, *arguments: object) -> object:
    """What `make` returns, or what it raised."""
    try:
        return make(*arguments)
    except Exception as error:
        return error


def unless_failed(made: object) -> object:
    if isinstance(made, Exception):
        raise made
    return made


def bnb_quantize(weight: torch.Tensor, double: bool) -> tuple:
    quantise = bitsandbytes().functional.quantize_4bit
    return quantise(weight, blocksize=64, quant_type="nf4", compress_statistics=double)


def bnb_constants(absmax: torch.Tensor, offset: torch.Tensor) -> tuple:
    return bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=256)


def bnb_absmax(codes: torch.Tensor, state: object, offset: torch.Tensor) -> torch.Tensor:
    return bitsandbytes().functional.dequantize_blockwise(codes, state) + offset


def bnb_linear(linear: nn.Linear) -> nn.Module:
    """The same weight as a layer of bitsandbytes, quantised on its device: NF4, block size 64, double quantization."""
    nn4 = bitsandbytes().nn
    weight = linear.weight.detach().clone()
    layer = nn4.Linear4bit(linear.in_features, linear.out_features, False, weight.dtype, True, "nf4")
    layer.weight = nn4.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(linear.weight.device).train()


def bnb_weight(layer: nn.Module) -> torch.Tensor:
    return bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def nf4_of(weight: torch.Tensor) -> torch.Tensor:
    return to_nf4()(weight.detach(), 64, 256)


def linear_nf4(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

    return nf4_tensor.linear_nf4(x, weight)


# --------------------------------------------------------------------------------------------------------------- output


def table(result: dict) -> str:
    """Every row, every contender: median with quartiles, share of its floor, and its time over ours."""
    lines = [
        f"{result['device']}, {result['date']}, driver {result['driver']}, CUDA {result['cuda']}: a copy "
        f"{result['bandwidth'] / 1e9:.4g} GB/s, a {result['half']} product {result['rate'] / 1e12:.3g} TFLOP/s"
    ]
    for row in result["rows"]:
        tokens = f", {row['tokens']} tokens" if "tokens" in row else ""
        lines.append(f"{row['work']}, {' x '.join(map(str, row['shape']))}, {row['dtype']}{tokens}")
        ours = row["seconds"]["ours"].get("median")
        for name, times in row["seconds"].items():
            if "error" in times:
                lines.append(f"  {name:14} {times['error']}")
                continue
            ratio = f"  x {times['median'] / ours:.2f}" if ours else ""
            spread = f"({shown(times['low'])} to {shown(times['high'])})"
            call = f"call {shown(times['call'])}"
            lines.append(
                f"  {name:14} {shown(times['median']):>9}  {spread:26} {times['share']:.2f} of the floor, {call}{ratio}"
            )
    return "\n".join(lines)


def section(results: list[dict]) -> str:
    """A row for each card, in Markdown; empty if there is no measurement."""
    if not results:
        return ""
    columns = ["device", "date", "copy, GB/s", "product, TFLOP/s", *SHOWN]
    lines = ["Our median, its share of the floor, and their time over ours; 16 bits, double quantization.", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        cells = [result["device"], result["date"], f"{result['bandwidth'] / 1e9:.0f}", f"{result['rate'] / 1e12:.0f}"]
        for work, shape, tokens in SHOWN.values():
            row = find(result["rows"], work, shape, result["half"], tokens)
            cells.append(_cell(row["seconds"]) if row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(times: dict[str, dict]) -> str:
    ours, theirs = times["ours"], times[PEER]
    if "error" in ours:
        return ours["error"]
    ratio = f", {PEER} x {theirs['median'] / ours['median']:.2f}" if "median" in theirs else ""
    return f"{shown(ours['median'])}, {ours['share']:.2f}{ratio}"


def in_readme(text: str, results: list[dict]) -> str:
    """Renew the table between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(results), "bench/README.md")


def stored() -> list[dict]:
    """The stored results of this bench, and of the kernels' part of device days (gpu_day.py)."""
    files = [*HERE.glob("gpu-*.json")]
    files = [file for file in files if not file.name.startswith("gpu-day-") or file.stem.endswith("-kernels")]
    return [json.loads(file.read_text("utf-8")) for file in sorted(files)]


def render() -> None:
    readme = HERE / "README.md"
    write(readme, in_readme(readme.read_text("utf-8"), stored()))


def measure_into(results: dict, device: torch.device, quick: bool, seconds: float = inf) -> None:
    """Put the rates, and as many rows as `seconds` allow, into `results`, each row as soon as it is measured."""
    bench = Bench(device, quick, seconds)
    results |= {"half": NAMES[bench.half], "bandwidth": bench.bandwidth, "rate": bench.rate}
    results |= {"rows": bench.rows, "left_out": bench.left_out}
    bench.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds")
    parser.add_argument("--render", action="store_true", help="do not measure: renew the table of bench/README.md")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/gpu-<device>.json)")
    args = parser.parse_args()
    if args.render:
        render()
        return
    if why := refusal():
        print(why, file=sys.stderr)
        sys.exit(2)
    device = the_device()
    if (args.quick or device.type == "cpu") and not (args.quick and args.out):
        parser.error("toy sizes measure nothing worth keeping, and the interpreter nothing else: --quick --out FILE")
    with rungs_on(device):
        try:
            check(device, args.quick)
        except Differs as difference:
            sys.exit(f"{difference}. Nothing was measured.")
        print("Every rung agrees with its twin.", file=sys.stderr)
        result = machine(device)
        measure_into(result, device, args.quick)
    write(args.out or HERE / f"gpu-{slug(result['device'])}.json", json.dumps(result, indent=1) + "\n")
    print(table(result))
    if not args.out:
        render()


if __name__ == "__main__":
    main()
