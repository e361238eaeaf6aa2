"""Contenders of bench/decode.py that are Python: one program for those that may share a process.

    python bench/decode_contenders.py ours | peers | bitsandbytes | ours_7b [--layers N]

Each library has a process of its own, so that none finds threads or memory as another one left them. Speaks JSON, a
line at a time. Out, once: {"contenders": names, "bytes": of our weights that a token reads, or null}. Then, for
each line {"contender", "prompt", "steps"}: {"first", "rest", "tokens"}, with seconds.
"""

import argparse
import copy
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TextIO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.cpu import bnb_linear  # noqa: E402
from bench.seven_b import byte_tokenizer  # noqa: E402
from qlora_lab.adapters.lora import adapters, add_lora  # noqa: E402
from qlora_lab.infer.decode import Decoding  # noqa: E402
from qlora_lab.infer.fast import bytes_read  # noqa: E402
from qlora_lab.infer.sampling import Sampling  # noqa: E402
from qlora_lab.infer.stack import read_stack  # noqa: E402
from qlora_lab.kernels import huge_pages  # noqa: E402
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


def ours(model: nn.Module, tokenizer, rows: int = 1, int8: bool = False) -> Contender:
    """Answer as a user does, `rows` times the same prompt at once, in int8 or in float32."""

    def seconds(prompt: list[int], tokens: int) -> float:
        start = perf_counter()
        run = Decoding(model, tokenizer, [prompt] * rows, tokens, Sampling(int8=int8))
        run._ends = []  # no end token, as for the others
        deque(run, maxlen=0)
        return perf_counter() - start

    return _in_two_lengths(seconds)


def theirs(model: nn.Module) -> Contender:
    """Answer through transformers' generate."""
    from transformers import GenerationConfig

    def seconds(prompt: list[int], tokens: int) -> float:
        how = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        start = perf_counter()
        with measuring(model):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**how))
        return perf_counter() - start

    return _in_two_lengths(seconds)


def _in_two_lengths(seconds: Callable[[list[int], int], float]) -> Contender:
    """Answers of two lengths separate the first token from the rest."""

    def answer(prompt: list[int], tokens: int) -> Sample:
        first = seconds(prompt, 1)
        return {"first": first, "rest": seconds(prompt, tokens) - first if tokens > 1 else 0.0}

    return answer


def adapted(model: nn.Module) -> nn.Module:
    """The model with a random adapter beside each packed weight."""
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
        packed = huge_pages.empty((n // 2,), torch.uint8).random_(0, 256, generator=g)
        shape, name = linear.weight.shape, "nf4"
        q = QuantizedTensor(packed, constants, codebook(name), name, 64, shape, torch.bfloat16)
        model.set_submodule(path, Linear4bit(q))
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = huge_pages.empty(parameter.shape, torch.bfloat16)  # as `load` and quantize take theirs
        value.copy_(torch.randn(parameter.shape, generator=g).mul_(0.02)).add_(parameter.dim() == 1)
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def of_ours() -> tuple[dict[str, Contender], int]:
    # as `qlora-lab generate` and `chat` load it
    packed, words = ql.load(MODEL, dtype=torch.bfloat16, progress=False)
    # loaded, not copied: a copy's head would lie in small pages
    tuned = adapted(ql.load(MODEL, dtype=torch.bfloat16, progress=False)[0])
    contenders = {"ours": ours(packed, words), f"ours, LoRA r={RANK}": ours(tuned, words)}
    contenders |= {"ours, int8": ours(packed, words, int8=True), f"ours, {ROWS} rows": ours(packed, words, ROWS)}
    return contenders, bytes_read(read_stack(packed))


def of_peers() -> tuple[dict[str, Contender], None]:
    names = {"transformers, bf16": torch.bfloat16, "transformers, float32": torch.float32}
    contenders = {name: theirs(ql.load(MODEL, None, dtype=dtype, progress=False)[0]) for name, dtype in names.items()}
    return contenders | {"generate on our layers": theirs(ql.load(MODEL, progress=False)[0])}, None


def of_bnb() -> tuple[dict[str, Contender], None]:
    return {
        "bitsandbytes": theirs(of_bitsandbytes(ql.load(MODEL, None, dtype=torch.bfloat16, progress=False)[0]))
    }, None


def of_ours_7b(layers: int) -> tuple[dict[str, Contender], int]:
    model, words = random_7b(layers), byte_tokenizer()
    contenders = {"ours": ours(model, words), "ours, int8": ours(model, words, int8=True)}
    return contenders, bytes_read(read_stack(model))


PROGRAMS = {"ours": of_ours, "peers": of_peers, "bitsandbytes": of_bnb, "ours_7b": of_ours_7b}


def own_output() -> TextIO:
    """Standard output, for replies alone: what a library prints goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--layers", type=int, help="of ours_7b")
    a = parser.parse_args()
    replies = own_output()
    contenders, n_bytes = PROGRAMS[a.program](*[a.layers] * (a.layers is not None))
    print(json.dumps({"contenders": list(contenders), "bytes": n_bytes}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sample = contenders[asked["contender"]](asked["prompt"], asked["steps"])
        print(json.dumps(sample | {"tokens": asked["steps"]}), file=replies, flush=True)


if __name__ == "__main__":
    main()
