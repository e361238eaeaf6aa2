"""What one machine computes, as JSON, for test_machines.py to compare: run in a process that pretends to be another.

No value is drawn by a library, because torch.randn gives other bits on another processor.
"""

import hashlib
import json

import torch

from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.infer import int8
from qlora_lab.kernels import choose, cpu, product
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.codebook import codebook, midpoints
from qlora_lab.quant.quantize import WEIGHT_DTYPES, dequantize, quantize


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    """Bell-shaped float32 values by exact arithmetic, the same on every machine."""
    n = torch.Size(shape).numel()
    i = torch.arange(1, n + 1, dtype=torch.int64)
    parts = [(i * factor * seed % 2**32).double() / 2**32 for factor in (2654435761, 2246822519, 3266489917, 668265263)]
    return (sum(parts) - 2).float().view(shape)


def digest(*tensors: torch.Tensor) -> str:
    """sha256 of their bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def hard(rows: int, columns: int) -> torch.Tensor:
    """Weights among which are zero blocks, ties, denormals and outliers."""
    weight = 0.02 * numbers(rows * columns)
    weight[640:710] = 0
    weight[1024:1088] *= 2.0**-120
    weight[2048 : 2048 + 15] = midpoints(codebook("nf4"))
    weight[2063] = 1
    weight[-3:] *= 50
    return weight.view(rows, columns)


def quantised_bytes() -> dict[str, str]:
    """Codebook and dtype -> digest of codes, of constants before and after double quantization, of decoded values."""
    found = {}
    for name in ("nf4", "fp4", "int4", "nf3", "int8"):
        weight = hard(512 if name == "nf4" else 64, 1024)  # 8192 constants: whole pieces of them
        for dtype in WEIGHT_DTYPES:
            single, double = (quantize(weight.to(dtype), name, 64, yes) for yes in (False, True))
            stored = double.constants.absmax_codes, double.constants.absmax_scale, double.constants.absmax_offset
            decoded = [dequantize(q, into).float() for q in (single, double) for into in WEIGHT_DTYPES]
            found[f"{name}, {dtype}"] = digest(single.packed, single.absmax, *stored, double.absmax, *decoded)
    return found


def allowed(terms: int, dtype: torch.dtype) -> float:
    """The most that a product may err, relative to sum(|x| |w|): docs/machines.md has the derivation."""
    sums = terms * 2.0**-24  # a float32 sum in any order (Higham, Accuracy and Stability, section 3.1)
    roundings = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 1}[dtype]  # in bf16 perhaps the weight's too
    return sums + 1.01 * roundings * torch.finfo(dtype).eps / 2


def worst_errors() -> dict[str, float]:
    """Race, dtype, tokens -> the largest error of a product and of its gradient, as a share of what is allowed."""
    found, q = {}, quantize(hard(96, 384), double_quant=True)
    weight = dequantize(q, torch.float32).double()
    for name in product.Race._fields:
        if name == "onednn" and not product._has_onednn():
            continue
        product.keep(product.Race.won_by(name))
        for dtype in WEIGHT_DTYPES:
            for tokens in (1, 16, 40):
                x, grad = numbers(tokens, 384, seed=3).to(dtype).requires_grad_(), numbers(tokens, 96, seed=5).to(dtype)
                y = Linear4bit(q)(x)
                y.backward(grad)
                shares = []
                for result, left, right in ((y, x, weight.t()), (x.grad, grad, weight)):
                    exact, size = left.detach().double() @ right, left.detach().double().abs() @ right.abs()
                    worst = ((result.double() - exact).abs() / size).max().item()
                    shares.append(worst / allowed(len(right), dtype))
                found[f"{name}, {dtype}, {tokens} tokens"] = max(shares)
    return found


def adapter_errors() -> dict[str, float]:
    """Race and tokens -> the largest error of an adapter's gradients, relative to the largest value; bf16 inputs."""
    found = {}
    for name in product.Race._fields:
        if name == "onednn" and not product._has_onednn():
            continue
        product.keep(product.Race.won_by(name))
        for tokens in (3, 40):
            lora = LoRALinear(Linear4bit(quantize(hard(96, 384), double_quant=True)), r=4, alpha=4)
            lora.lora_A.data, lora.lora_B.data = numbers(4, 384, seed=7), numbers(96, 4, seed=9)
            x, grad = numbers(tokens, 384, seed=3).bfloat16(), numbers(tokens, 96, seed=5).bfloat16()
            lora(x).backward(grad)
            A, B, x, grad = (t.detach().double() for t in (lora.lora_A, lora.lora_B, x, grad))
            wanted = (grad @ B).t() @ x, grad.t() @ (x @ A.t())
            given = lora.lora_A.grad, lora.lora_B.grad
            errors = [(g.double() - w).abs().max() / w.abs().max() for g, w in zip(given, wanted, strict=True)]
            found[f"{name}, {tokens} tokens"] = max(errors).item()
    return found


def int8_product() -> str:
    """Digest of a product in int8: whole numbers, and float32 sums in one order."""
    x = numbers(40, 384, seed=3)
    x[7, :40], x[9, 3] = 0, 1e4
    return digest(int8.forward(x, quantize(hard(96, 384), double_quant=True)))


def eight_bit_steps() -> str:
    """Digest of a parameter after three steps of AdamW with moments of 8 bits."""
    parameter = torch.nn.Parameter(numbers(5000))
    optimizer = PagedAdamW([parameter], lr=1e-2, bits=8)
    for step in (1, 2, 3):
        parameter.grad = numbers(5000, seed=2 * step + 1)
        optimizer.step()
    return digest(parameter.detach())


if __name__ == "__main__":
    results = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[str(threads)] = {
            "bytes": quantised_bytes() | {"AdamW, 8 bits": eight_bit_steps()},
            "products": worst_errors(),
            "adapters": adapter_errors(),
            "int8": int8_product(),
        }
    print(json.dumps({"vector": cpu.FAST, "kernels": choose("cpu").name, "threads": results}))
