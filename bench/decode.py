"""Time greedy answers of SmolLM2-135M, a token and a prompt, beside transformers, bitsandbytes and llama.cpp.

    npm install --prefix build node-llama-cpp    once, for llama.cpp; without it the others run
    python bench/decode.py                       writes decode.json; leave the machine idle meanwhile
    python bench/decode.py --seven-b             the shape of Llama-2-7B, random bytes; 13 GB of memory, 9 of disk

In each round every contender answers once, each starting with another one: the first token after a prompt, and the rest
one by one. "floor" is the time of reading all bytes that a token reads, at the speed at which a copy in the same round
moves bytes. All have the same number of threads. llama.cpp reads Q4_1 and Q4_0 files that this library writes.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.cpu import bnb_linear  # noqa: E402
from bench.decode_page import STORED, render  # noqa: E402
from bench.files import write  # noqa: E402
from bench.random_gguf import FORMATS, write_random  # noqa: E402
from bench.timing import cpu_name, spread  # noqa: E402
from qlora_lab.adapters.lora import adapters, add_lora  # noqa: E402
from qlora_lab.infer.cache import make_cache  # noqa: E402
from qlora_lab.infer.fast import bytes_read, step_of  # noqa: E402
from qlora_lab.infer.stack import read_stack  # noqa: E402
from qlora_lab.infer.step import read_prompt  # noqa: E402
from qlora_lab.model.linear4bit import Linear4bit, linears_to_quantise  # noqa: E402
from qlora_lab.model.modes import measuring  # noqa: E402
from qlora_lab.quant.codebook import codebook  # noqa: E402
from qlora_lab.quant.double_quant import DoubleQuantized  # noqa: E402
from qlora_lab.quant.quantize import QuantizedTensor  # noqa: E402

MODEL = "smollm2-135m"
ROWS = 8  # of the batch
RANK = 16
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_7B |= {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
Sample = dict[str, float]  # seconds: first, of the prompt and a token; rest, of the tokens after it
Contender = Callable[[list[int], int], Sample]


def ours(model: nn.Module, rows: int = 1, int8: bool = False) -> Contender:
    """Answer through the decode path, `rows` times the same prompt at once, in int8 or in float32."""
    stack = read_stack(model)
    step, every = step_of(stack, int8), torch.arange(rows)

    def answer(prompt: list[int], tokens: int) -> Sample:
        start = perf_counter()
        cache = make_cache(stack, rows, len(prompt) + tokens)
        with torch.no_grad():
            for row in range(rows):
                read_prompt(stack, torch.tensor(prompt[:-1]), cache, row, int8)
            token = step(torch.tensor(prompt[-1:] * rows), cache, every).argmax(-1)
            first = perf_counter() - start
            for _ in range(tokens - 1):
                token = step(token, cache, every).argmax(-1)
        return {"first": first, "rest": perf_counter() - start - first}

    return answer


def theirs(model: nn.Module) -> Contender:
    """Answer through transformers' generate; answers of two lengths separate the first token from the rest."""
    from transformers import GenerationConfig

    def seconds(prompt: list[int], tokens: int) -> float:
        how = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        start = perf_counter()
        with measuring(model):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**how))
        return perf_counter() - start

    def answer(prompt: list[int], tokens: int) -> Sample:
        first = seconds(prompt, 1)
        return {"first": first, "rest": seconds(prompt, tokens) - first if tokens > 1 else 0.0}

    return answer


class LlamaCpp:
    """llama.cpp in a process of its own, which waits for prompts."""

    def __init__(self, file: Path, packages: Path):
        self._process = subprocess.Popen(
            ["node", HERE / "decode.mjs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        options = {"file": str(file), "threads": torch.get_num_threads(), "packages": str(packages.resolve())}
        self.version = self._ask(options)

    def _ask(self, asked: dict) -> dict:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"node ended with {self._process.wait()}: see what it wrote above")
        return json.loads(line)

    def __call__(self, prompt: list[int], tokens: int) -> Sample:
        sample = self._ask({"prompt": prompt, "steps": tokens})
        assert sample["tokens"] == tokens, sample
        return {"first": sample["first"], "rest": sample["rest"]}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def installed(packages: Path) -> bool:
    return (packages / "node_modules" / "node-llama-cpp").exists()


def closed(programs: dict[str, LlamaCpp]) -> dict[str, dict]:
    """End them, and return their versions."""
    for program in programs.values():
        program.close()
    return {name: program.version for name, program in programs.items()}


def copy_seconds(n_bytes: int) -> float:
    """Seconds in which a copy moves so many bytes, half of them read and half written."""
    source = torch.ones(2**26)  # 256 MiB: no cache holds it
    target = torch.zeros_like(source)
    start = perf_counter()
    target.copy_(source)
    return (perf_counter() - start) * n_bytes / (2 * source.nbytes)


def adapted(model: nn.Module) -> nn.Module:
    """The same packed weights with a random adapter beside each."""
    model = copy.deepcopy(model)
    add_lora(model, r=RANK, alpha=RANK)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    return model


def of_bitsandbytes(dense: nn.Module) -> nn.Module:
    """Our layers' weights in bitsandbytes' layers, on its inference path."""
    model = copy.deepcopy(dense)
    for path, linear in linears_to_quantise(model).items():
        model.set_submodule(path, bnb_linear(linear, torch.bfloat16, training=False))
    return model


def random_7b(layers: int) -> nn.Module:
    """A model with the shape of Llama-2-7B, packed: random bytes, so that nothing has to be quantised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B | {"num_hidden_layers": layers})).bfloat16()
    g = torch.Generator().manual_seed(0)
    for path, linear in linears_to_quantise(model).items():
        n = linear.weight.numel()
        codes = torch.randint(0, 256, (n // 64,), dtype=torch.uint8, generator=g)
        constants = DoubleQuantized(codes, torch.full((-(-len(codes) // 256),), 0.01), torch.tensor(0.05))
        packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, generator=g)
        shape, name = linear.weight.shape, "nf4"
        q = QuantizedTensor(packed, constants, codebook(name), name, 64, shape, torch.bfloat16)
        model.set_submodule(path, Linear4bit(q))
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=g).mul_(0.02).bfloat16() + (parameter.dim() == 1)
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def measure(contenders: dict[str, Contender], n_bytes: int, sizes: tuple[int, int], rounds: int) -> dict:
    """Seconds of each contender: of the prompt with its first token, and of each token after it."""
    prompt_tokens, tokens = sizes
    prompt = torch.randint(1000, 2000, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for run in contenders.values():
        run(prompt, min(tokens, 3))  # kernels compile, memory is there
    found = {name: {"first": [], "token": []} for name in contenders}
    floors = []
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            sample = contenders[name](prompt, tokens)
            found[name]["first"].append(sample["first"])
            if tokens > 1:
                found[name]["token"].append(sample["rest"] / (tokens - 1))
        floors.append(copy_seconds(n_bytes))
    rows = {name: {key: spread(values) for key, values in of.items() if values} for name, of in found.items()}
    return {"prompt": prompt_tokens, "tokens": tokens, "rounds": rounds, "bytes": n_bytes, "floor": spread(floors),
            "contenders": rows}  # fmt: skip


def smollm2(packages: Path, scratch: Path, rounds: int, tokens: int) -> list[dict]:
    packed, _ = ql.load(MODEL, progress=False)
    narrow, wide = (ql.load(MODEL, None, dtype=dtype, progress=False)[0] for dtype in (torch.bfloat16, torch.float32))
    contenders = {"ours": ours(packed), f"ours, LoRA r={RANK}": ours(adapted(packed))}
    contenders["ours, int8"] = ours(packed, int8=True)
    contenders |= {"transformers, bf16": theirs(narrow), "transformers, float32": theirs(wide)}
    contenders |= {"generate on our layers": theirs(packed), "bitsandbytes": theirs(of_bitsandbytes(narrow))}
    programs = {}
    if installed(packages):
        for format in FORMATS:
            ql.to_gguf(ql.fetch(MODEL), scratch / f"{format}.gguf", format, progress=False)
            programs[f"llama.cpp, {format}"] = LlamaCpp(scratch / f"{format}.gguf", packages)
    n_bytes = bytes_read(read_stack(packed))
    every = contenders | programs
    rows = [measure(every, n_bytes, (32, tokens), rounds), measure(every, n_bytes, (512, 1), rounds)]
    batch = {"ours": contenders["ours"], f"ours, {ROWS} rows": ours(packed, ROWS)}
    rows.append(measure(batch, n_bytes, (32, tokens), rounds))
    names = closed(programs)
    return [{"model": MODEL, "programs": names} | row for row in rows]


def seven_b(packages: Path, scratch: Path, rounds: int, layers: int) -> list[dict]:
    shape = LLAMA_7B | {"num_hidden_layers": layers}
    model = random_7b(layers)
    programs = {}
    if installed(packages):
        for format in FORMATS:
            file = scratch / f"{format}.gguf"
            write_random(file, format, shape)
            programs[f"llama.cpp, {format}"] = LlamaCpp(file, packages)
    contenders = {"ours": ours(model), "ours, int8": ours(model, int8=True)}
    result = measure(contenders | programs, bytes_read(read_stack(model)), (32, 32), rounds)
    return [{"model": "random weights", "shape": shape, "programs": closed(programs)} | result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--packages", type=Path, default=HERE.parent / "build", help="where node-llama-cpp is")
    parser.add_argument("--seven-b", action="store_true", help="only the model with the shape of Llama-2-7B")
    parser.add_argument("--layers", type=int, default=32, help="of that model")
    parser.add_argument("--out", type=Path, default=STORED)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        where = a.packages, Path(home), a.rounds
        rows = seven_b(*where, a.layers) if a.seven_b else smollm2(*where, a.tokens)
    earlier = json.loads(a.out.read_text("utf-8"))["rows"] if a.out.exists() else []
    kept = [row for row in earlier if row["model"] not in {row["model"] for row in rows}]  # of the other model
    facts = {"date": date.today().isoformat(), "processor": cpu_name(), "threads": torch.get_num_threads()}
    result = {"torch": torch.__version__, "rows": kept + [facts | row for row in rows]}
    write(a.out, json.dumps(result, indent=1) + "\n")
    if a.out == STORED:
        render()
    for row in rows:
        print(f"{row['model']}: prompt {row['prompt']}, {row['tokens']} tokens, floor {row['floor']['median']:.4f} s")
        for name, of in row["contenders"].items():
            print(f"  {name:28}", {key: round(value["median"], 5) for key, value in of.items()})


if __name__ == "__main__":
    main()
