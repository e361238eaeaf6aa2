"""Measure a LLaMA with 7B parameters on this machine: load, quantise on disk, map, one training step, an answer.

    python bench/seven_b.py                      write a checkpoint with random weights (13.5 GB), measure, delete it
    python bench/seven_b.py --folder FOLDER      use a real one, such as a copy of Llama-2-7b
    python bench/seven_b.py --quick --out FILE   use a toy of the same form: to see that it runs

The checkpoint has Llama 2's configuration and the form of the hub's: bf16 shards of at most 5 GB and an index. Each
stage runs in a process of its own, so that its peak is its own. A peak is the highest resident set (pages of mapped
files included) minus the one after the imports; for the training step it is all of it. It writes seven_b.json.

The floor of the step is the time of the matrix products that no implementation avoids. Each is timed in the same
process with a ready weight in the faster dtype: each layer's weights three times (forward, forward again for
checkpointing, and the gradient of its input), the adapters' and the head's.
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

from bench.steps import SEVEN_B, render  # noqa: E402
from qlora_lab.train.resident import peak_resident, reset_peak, resident  # noqa: E402

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TOY = SHAPE | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 400}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
SHARD = 5 * 10**9  # bytes
R = 64
TOKENS = 512
ANSWER = 16
GIB = 2**30
OUT = HERE / SEVEN_B


# ----------------------------------------------------------------------------------------------------------- checkpoint


def write_checkpoint(folder: Path, shape: dict, shard_bytes: int) -> None:
    """Write config, tokenizer and random bf16 weights layer by layer; the whole model is never in memory."""
    import torch
    from safetensors.torch import save_file
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards = []
    room = 0
    for name, size in shapes.items():
        nbytes = 2 * size.numel()
        if not shards or nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= nbytes
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(tqdm(shards, "writing", unit="shard"), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _draw(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(2 * s.numel() for s in shapes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _draw(shape, generator):
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def byte_tokenizer():
    """A tokenizer with one token per byte, so that a text can have any number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# -------------------------------------------------------------------------------------------- stages, each in a process


def load(folder: Path, scratch: Path, quick: bool) -> dict:
    """Stream the original through the quantiser into memory."""
    bytes_read = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _warm_up(scratch)
    result = _measured(lambda: _load(folder))
    result["MB per core-second"] = bytes_read / 1e6 / result["core_seconds"]
    return result


def quantise(folder: Path, scratch: Path, quick: bool) -> dict:
    """Stream the original through the quantiser onto the disk."""
    from qlora_lab.model.quantized_folder import quantize_folder

    _warm_up(scratch)
    return _measured(lambda: quantize_folder(folder, scratch / "small", progress=False))


def map_again(folder: Path, scratch: Path, quick: bool) -> dict:
    """Load the folder that is stored in 4 bits."""
    _warm_up(scratch)
    result = _measured(lambda: _load(scratch / "small"))
    result["folder_bytes"] = sum(path.stat().st_size for path in (scratch / "small").iterdir())
    return result


def step(folder: Path, scratch: Path, quick: bool) -> dict:
    """One training step on 512 tokens: LoRA on all linear layers, gradient checkpointing."""
    import qlora_lab as ql
    from qlora_lab.data.dataset import encode
    from qlora_lab.data.examples import Example

    model, tokenizer = _load(scratch / "small")
    r = 8 if quick else R
    ql.add_lora(model, r=r)
    text = "the quick brown fox " * 26  # 512 tokens, of which 64 are learned
    short = len(encode(Example((("user", text), ("assistant", text[:63]))), tokenizer).input_ids) - TOKENS
    example = Example((("user", text[: -short or None]), ("assistant", text[:63])))
    options = {"steps": 1, "batch_size": 1, "max_length": TOKENS, "gradient_checkpointing": True, "progress": False}
    run = ql.finetune(model, tokenizer, [example], out=scratch / "run", **options)
    peak = peak_resident()
    floor = _floor(model, TOKENS, run.data.learned_tokens, r)
    return {
        "seconds": run.seconds,
        "peak_bytes": peak,
        "tokens": run.tokens,
        "learned_tokens": run.data.learned_tokens,
        "r": r,
        "loss": run.losses[0],
        "floor_seconds": floor,
        "over_floor": run.seconds / floor,
    }


def answer(folder: Path, scratch: Path, quick: bool) -> dict:
    """Generate some tokens with the adapter."""
    import qlora_lab as ql

    model, tokenizer = _load(scratch / "small")
    ql.load_adapter(model, scratch / "run" / "adapter")
    start = time.perf_counter()
    ql.generate(model, tokenizer, "What is NF4?", ANSWER)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_resident(), "most_tokens": ANSWER}


STAGES = {function.__name__: function for function in (load, quantise, map_again, step, answer)}


def _load(folder: Path):
    import torch

    import qlora_lab as ql

    return ql.load(folder, dtype=torch.bfloat16, progress=False)


def _warm_up(scratch: Path) -> None:
    """Import everything and compile kernels on a toy model, so that a stage measures only its own model."""
    toy = scratch / "toy"
    if not toy.exists():
        toy.mkdir()
        write_checkpoint(toy, TOY, SHARD)
    _load(toy)


def _measured(work) -> dict:
    before = resident()
    start = time.perf_counter()
    cpu = time.process_time()
    reset_peak()
    work()
    seconds = time.perf_counter() - start
    core_seconds = time.process_time() - cpu
    return {"seconds": seconds, "core_seconds": core_seconds, "peak_bytes_above_import": peak_resident() - before}


def _floor(model, tokens: int, learned: int, r: int) -> float:
    """Seconds of the products that a step cannot avoid; each shape is timed once, in the faster of two dtypes."""
    from collections import Counter

    from qlora_lab.adapters.lora import adapters

    shapes = Counter((layer.base.out_features, layer.base.in_features) for layer in adapters(model).values())
    seconds = 0.0
    for (rows, columns), count in shapes.items():
        passes = 2 * _product(tokens, columns, rows) + _product(tokens, rows, columns)
        # x A^T and low B^T twice; in backward grad B, grad A's and grad B's products, low's way back
        thin = 3 * _product(tokens, columns, r) + 3 * _product(tokens, r, rows) + 2 * _product(r, tokens, columns)
        seconds += count * (passes + thin)
    head, width = model.lm_head.weight.shape
    return seconds + 2 * _product(learned, width, head)


def _product(m: int, k: int, n: int) -> float:
    """Seconds of an (m, k) by (k, n) product, best of float32 and bf16, best of three."""
    import torch

    best = float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        out = torch.empty(m, n, dtype=dtype)
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            best = min(best, time.perf_counter() - start)
    return best


# ------------------------------------------------------------------------------------------------------------------ run


def measure(folder: Path, scratch: Path, quick: bool) -> dict:
    """Run every stage in a process of its own, in order; each uses what the earlier ones wrote."""
    results = {}
    for name in STAGES:
        print(f"{name} ...", flush=True)
        command = [sys.executable, __file__, "--stage", name, "--folder", str(folder), "--scratch", str(scratch)]
        done = subprocess.run(command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"stage {name} failed with exit code {done.returncode}: its message is above")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print("   ", ", ".join(f"{key} {_readable(key, value)}" for key, value in results[name].items()), flush=True)
    return results


def _readable(key: str, value: float) -> str:
    if "bytes" in key:
        return f"{value / GIB:.2f} GiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a model folder instead of random weights")
    parser.add_argument("--scratch", type=Path, help="a folder with room for 20 GB; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="a toy model")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.stage:
        print(json.dumps(STAGES[a.stage](a.folder, a.scratch, a.quick)))
        return
    if a.quick and a.out == OUT:
        parser.error("--quick needs --out: its figures mean nothing")
    scratch = Path(tempfile.mkdtemp(prefix="seven-b-", dir=a.scratch))
    try:
        folder = a.folder or scratch / "original"
        if a.folder is None:
            folder.mkdir()
            write_checkpoint(folder, TOY if a.quick else SHAPE, 10**5 if a.quick else SHARD)
        results = measure(folder, scratch, a.quick)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    from bench.cpu import versions
    from bench.files import write
    from bench.timing import cpu_name

    weights = "random weights" if a.folder is None else a.folder.name
    head = {"date": datetime.date.today().isoformat(), "machine": cpu_name(), "versions": versions()}
    head |= {"memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "model": weights}
    write(a.out, json.dumps(head | {"stages": results}, indent=1) + "\n")
    if a.out == OUT:
        render()


if __name__ == "__main__":
    main()
