"""torch.set_default_dtype, as other libraries call it, changes no bit of what ours returns.

In: a float32 LLaMA on disk. A process of its own sets the default before it imports qlora_lab, since tables are kept
once they are made. What each function below returns is compared with what it returns under torch's own default.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import warm
from tests.infer.conftest import small

ROWS = [{"instruction": f"{i} and {i}", "output": "two" if i % 2 else "too"} for i in range(8)]
TEXT = "the sum of the two numbers, assistant and user and system " * 4
QUIET = {"progress": False}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw float32 under any default."""
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def tables(folder, out):
    from qlora_lab.measure.codebook_trial import normal_weights, shaped_levels, stretched_density
    from qlora_lab.measure.low_rank import target
    from qlora_lab.measure.published import published_af4, published_nf4
    from qlora_lab.quant.codebook import CODEBOOKS, codebook, midpoints, zero_code
    from qlora_lab.quant.double_quant import dynamic_map

    yield from ((name, codebook(name)) for name in CODEBOOKS)
    yield "zeros", torch.tensor([zero_code(codebook(name)) for name in CODEBOOKS])
    yield "midpoints", midpoints(codebook("nf4"))
    yield "dynamic", dynamic_map()
    yield "unsigned", dynamic_map(signed=False)
    yield "published", torch.stack([published_nf4(), published_af4()])
    yield "normal", normal_weights(64)
    yield "shaped", shaped_levels(1.1)
    yield "density", stretched_density(draw(8), 0.95)
    yield "low rank", target(8, 0.5)


def quantised(folder, out):
    import qlora_lab as ql
    from qlora_lab.kernels import few_tokens, product
    from qlora_lab.measure.constants import stored_constants

    for name in ("nf4", "nf3", "fp4", "int8"):
        for double in (False, True):
            q = ql.quantize(draw(16, 80), name, 64, double_quant=double)
            parts = {"packed": q.packed, "absmax": q.absmax, "levels": q.levels, "whole": ql.dequantize(q)}
            parts["half"] = ql.dequantize(q, torch.bfloat16)
            yield from ((f"{name} {double} {part}", tensor) for part, tensor in parts.items())
    q = ql.quantize(draw(64, 128))
    yield "many tokens", product.forward(draw(20, 128), q.plain, 64)
    if few_tokens.can_multiply(128, q.plain):
        yield "few tokens", few_tokens.multiply_blocks(draw(2, 128), q.plain, 64)
    for mean_offset in (False, True):
        yield f"constants {mean_offset}", stored_constants(q.absmax, "int8", 256, mean_offset)


def readable(folder, out):
    from qlora_lab import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.OVERRIDE, "reference")
        kernels._choose.cache_clear()
        yield from quantised(folder, out)
    kernels._choose.cache_clear()


def layers(folder, out):
    import qlora_lab as ql
    from qlora_lab.adapters.lora_linear import LoRALinear
    from qlora_lab.model.linear4bit import Linear4bit

    for dtype in (torch.float32, torch.bfloat16):
        q = ql.quantize(draw(64, 64).to(dtype), double_quant=True)
        layer = LoRALinear(Linear4bit(q), r=4, alpha=8, generator=torch.Generator().manual_seed(0))
        layer.lora_B.data += 0.1
        x = draw(40, 64).to(dtype).requires_grad_()
        y = layer(x)
        y.sum().backward()
        parts = {"y": y, "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad, "change": layer.change(q.absmax)}
        yield from ((f"{dtype} {name}", tensor) for name, tensor in parts.items())


def methods(folder, out):
    import qlora_lab as ql
    from qlora_lab.adapters.adapter import learned
    from qlora_lab.adapters.add_adapter import METHODS

    options = {"prefix": {"mlp": 8}, "prompt": {"start": "the sum"}}
    for method in METHODS:
        if method == "bitfit":  # a LLaMA has no biases; zero_bias adds some, of the same class
            continue
        model, tokenizer = ql.load(folder, None if method == "full" else "nf4", **QUIET)
        more = options.get(method, {}) | ({"tokenizer": tokenizer} if method == "prompt" else {})
        ql.add_adapter(model, method, **more, **QUIET)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"][:12]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        yield f"{method} loss", loss
        for name, tensor in learned(model).items():
            yield f"{method} {name}", tensor
            if tensor.grad is not None:
                yield f"{method} {name} gradient", tensor.grad


def training(folder, out):
    import qlora_lab as ql
    from qlora_lab.adapters.adapter import learned

    for bits in (32, 8):
        model, tokenizer = ql.load(folder, **QUIET)
        yield f"before {bits}", torch.tensor(ql.perplexity(model, tokenizer, TEXT, 16, 2, **QUIET), dtype=torch.float64)
        ql.add_lora(model, r=4, dropout=0.1)
        run = ql.finetune(model, tokenizer, ROWS, 2, out / f"run{bits}", optimizer_bits=bits, batch_size=2, **QUIET)
        yield f"losses {bits}", torch.tensor(run.losses, dtype=torch.float64)
        yield from ((f"{bits} {name}", tensor) for name, tensor in learned(model).items())


def optimizer(folder, out):
    import qlora_lab as ql

    for bits in (32, 8):
        p = torch.nn.Parameter(draw(300))
        steps = ql.PagedAdamW([p], lr=0.1, bits=bits, page_size=4096, budget=4096)
        for seed in range(3):
            p.grad = draw(300, seed=seed)
            steps.step()
            if seed == 1:
                steps.load_state_dict(steps.state_dict())
        yield f"{bits} p", p
        state = steps.state_dict()["state"][0]
        yield from ((f"{bits} {name}", value) for name, value in state.items() if isinstance(value, torch.Tensor))


def folders(folder, out):
    import qlora_lab as ql
    from qlora_lab.adapters.adapter import learned
    from qlora_lab.export import xray
    from qlora_lab.model.linear4bit import Linear4bit

    stored = ql.quantize_folder(folder, out / "packed", **QUIET)
    model, tokenizer = ql.load(stored, **QUIET)
    again, _ = ql.load(folder, **QUIET)
    for name, of in (("stored", model), ("loaded", again)):
        for path, module in of.named_modules():
            if isinstance(module, Linear4bit):
                yield f"{name} {path}", ql.dequantize(module.weight)
    ql.add_lora(again, r=4)
    for tensor in learned(again).values():
        tensor.data += 0.01
    ql.save_adapter(again, out / "adapter")
    ql.load_adapter(model, out / "adapter")
    yield from ((f"adapter {name}", tensor) for name, tensor in learned(model).items())
    checkpoint = xray.Checkpoint(stored)
    assert xray.scanned(checkpoint, **QUIET) == []
    for key, tensor in checkpoint.tensors.items():
        yield f"xray {key}", xray.values(checkpoint, key, 0, tensor.numel)
    for target in ("dequantised", "requantised"):
        report = ql.merge(again, out / target, target, anyway=True, **QUIET)
        yield f"{target} report", torch.tensor([report.arrived], dtype=torch.float64)
        for file in sorted((out / target).glob("*.safetensors")):
            yield from ((f"{target} {name}", tensor) for name, tensor in load_file(file).items())


def answers(folder, out):
    import qlora_lab as ql
    from qlora_lab.infer import fast, step
    from qlora_lab.infer.cache import make_cache
    from qlora_lab.infer.stack import read_stack

    fast.can_step = lambda stack: False  # the kernel compiles for half a minute: see compiled_answers
    yield from compiled_answers(folder, out)
    model, _ = ql.load(folder, **QUIET)
    for bits in (32, 8):
        stack = read_stack(model)
        cache = make_cache(stack, 1, 16, bits)
        step.read_prompt(stack, torch.tensor([3, 4, 5]), cache)
        yield f"logits {bits}", step.step(stack, torch.tensor([6]), cache, torch.tensor([0]))


def compiled_answers(folder, out):
    import qlora_lab as ql

    model, tokenizer = ql.load(folder, **QUIET)
    for name, how in {
        "greedy": {},
        "drawn": {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1},
        "int8": {"int8": True},
        "8 bits": {"cache_bits": 8},
    }.items():
        for answer in ql.decode(model, tokenizer, ["the sum of", "two"], 5, ql.Sampling(**how), **QUIET):
            yield f"{name} {answer.text!r}", torch.tensor(answer.ids)


AREAS = [tables, quantised, readable, layers, methods, training, optimizer, folders, answers]


def child(default: str, names: list[str], folder: Path, out: Path) -> None:
    """Write what each function returns to out/NAME.safetensors, or the error that it raised to out/errors.json."""
    torch.set_default_dtype(getattr(torch, default))
    torch.set_num_threads(1)
    from qlora_lab.kernels import product

    product.keep(product.Race.won_by("float32"))  # two processes may time it differently
    errors = {}
    for name in names:
        torch.manual_seed(0)
        try:
            found = {key: tensor.detach().clone().contiguous() for key, tensor in globals()[name](folder, out)}
            save_file(found, out / f"{name}.safetensors")
        except Exception as error:  # the other functions are still tried
            errors[name] = repr(error)
    (out / "errors.json").write_text(json.dumps(errors), "utf-8")


def found(default: str, names: list[str], folder: Path, out: Path) -> Path:
    out.mkdir()
    process = warm.start(child, default, names, folder, out)
    process.join(300)
    assert process.exitcode == 0
    return out


@pytest.fixture(scope="module")
def model_folder(saved_llama, tmp_path_factory):
    """A model whose layers int8 takes, too: rows of whole blocks."""
    folder = shutil.copytree(saved_llama, tmp_path_factory.mktemp("model") / "llama")
    small().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(model_folder, tmp_path_factory):
    """default -> folder of results; a process runs when its default is first asked for."""
    kept, top = {}, tmp_path_factory.mktemp("defaults")

    def of(default: str) -> Path:
        if default not in kept:
            kept[default] = found(default, [area.__name__ for area in AREAS], model_folder, top / default)
        return kept[default]

    return of


def compare(area: str, expected: Path, other: Path) -> None:
    for folder in (expected, other):
        assert json.loads((folder / "errors.json").read_text("utf-8")).get(area) is None
    expected, other = (load_file(folder / f"{area}.safetensors") for folder in (expected, other))
    assert other.keys() == expected.keys() and expected
    assert {key: tensor.dtype for key, tensor in other.items()} == {key: t.dtype for key, t in expected.items()}
    assert [key for key, tensor in other.items() if not torch.equal(tensor, expected[key])] == []


@pytest.mark.long
@pytest.mark.parametrize("area", [area.__name__ for area in AREAS])
@pytest.mark.parametrize("default", ["bfloat16", "float16", "float64"])
def test_a_default_dtype_changes_nothing(default, area, results):
    compare(area, results("float32"), results(default))


@pytest.mark.slow
@pytest.mark.parametrize("default", ["bfloat16", "float64"])
def test_nor_for_the_compiled_step(default, model_folder, tmp_path):
    names = [compiled_answers.__name__]
    expected = found("float32", names, model_folder, tmp_path / "float32")
    compare(*names, expected, found(default, names, model_folder, tmp_path / default))
