"""Every parser of ours for a file on disk, with a good file to damage: for tables of hostile contents, and for fuzzing.

    reader = READERS["plan"]
    path = reader.prepare(folder)        # writes the good files into an empty folder; the path is the one to damage
    good = path.read_bytes()
    path.write_bytes(damaged(good))
    reader.read(path)                    # a value, or one of reader.errors; its message names the file

`cheap` readers take well under a millisecond; the others build a model of hidden size 16 first.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qlora_lab.adapters.adapter_base import WEIGHTS_KEY
from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.data.examples import read_examples
from qlora_lab.exercises.submission import read_submission
from qlora_lab.files import ownership
from qlora_lab.files.checksums import sha256
from qlora_lab.files.results_file import read_results
from qlora_lab.files.strict_json import read_json
from qlora_lab.measure.sweep import _source_note
from qlora_lab.memory.shape import shape_of
from qlora_lab.model.empty_model import empty_model, fields_of, tokenizer_of
from qlora_lab.model.fetch import ModelError, resolve
from qlora_lab.model.model_files import weight_files
from qlora_lab.quant.plan import Candidate, Plan, load_plan
from qlora_lab.quant.quantize import quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors
from qlora_lab.train import checkpoint, run_record
from qlora_lab.train.resumed import read_log

MISTAKES = (ValueError, OSError, ModelError)  # what the command line tells in one line
LINEAR = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read. file: its name. fill: writes it, and what belongs to it, into a folder."""

    file: str
    fill: Callable[[Path], Any]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = MISTAKES
    cheap: bool = True

    def prepare(self, folder: Path) -> Path:
        """The path of a good file in `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.fill(folder)
        return folder / self.file


# ----------------------------------------------------------------------------------------------------------- good files


@cache
def _toy() -> Path:
    """A folder with a LLaMA of one layer in three shards, and a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="readers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = {word: i for i, word in enumerate(["<s>", "</s>", "user", "assistant", *map(chr, range(97, 123))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "</s>"}
    template = "{% for message in messages %}{{ message.role + ' ' + message.content + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=template, **options).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **shape))
    model.generation_config.update(max_length=20, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder, max_shard_size="6KB")
    (folder / "special_tokens_map.json").write_text(json.dumps(options))
    return folder


def copy_model(folder: Path) -> None:
    """Copy the toy model there: config.json, generation_config.json, three shards, their index, and the tokenizer."""
    shutil.copytree(_toy(), folder, dirs_exist_ok=True)


def _write(name: str, content: Any) -> Callable[[Path], Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _plan(folder: Path) -> None:
    chosen = {LINEAR: Candidate("nf4", 64, True), "head": Candidate("int8", 16, False)}
    Plan("toy", chosen, 0.25, 4.5, {LINEAR: 512, "head": 480}).save(folder / "plan.json")


def _checkpoint(folder: Path) -> None:
    if not checkpoint.saved_steps(folder):
        checkpoint.save_checkpoint(folder, 3, {"adapter.a": torch.ones(2)}, {"best": {"loss": None, "step": 0}}, keep=1)


def _read_state(path: Path) -> Any:
    """A state.json whose checksum is right: what a careful forger would write."""
    step = path.parent
    if path.is_file():
        names = checkpoint.FACTS, checkpoint.TENSORS
        (step / checkpoint.SUMS).write_text("".join(f"{sha256(step / name)}  {name}\n" for name in names))
    return checkpoint.load_checkpoint(path.parents[2], 3)


@cache
def _model() -> Any:
    model = empty_model(_toy(), torch.float32)
    return model.to_empty(device="cpu").requires_grad_(False)


def _adapter(folder: Path) -> None:
    from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS

    keys = {f"base_model.model.{LINEAR}.lora_A.weight": torch.ones(2, 16)}
    keys |= {f"base_model.model.{LINEAR}.lora_B.weight": torch.ones(32, 2)}
    save_file(keys, folder / WEIGHTS, metadata={"format": "pt", WEIGHTS_KEY: "16 or 32 bits"})
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}))


def _read_adapter(path: Path) -> Any:
    from copy import deepcopy

    return load_adapter(deepcopy(_model()), path.parent)


def _row() -> dict:
    row = {"model": {"name": "toy", "weights_sha256": "0" * 64, "config_sha256": "1" * 64}}
    row |= {"data": {"tokens_sha256": "2" * 64}, "config": {"windows": 1}, "codebook": "nf4", "levels": None}
    row |= {"block_size": 64, "double_quant": True, "quantiser": "3" * 16, "versions": {}, "perplexity": 2.0}
    row |= {"window_losses": [0.7], "bits_per_parameter": 4.5, "relative_error": 0.01, "layer_errors": {}}
    return row | {"entropy": 3.9, "code_share": [0.5, 0.5]}


def _quantised(folder: Path) -> None:
    q = quantize(torch.linspace(-1, 1, 1024).reshape(32, 32), "nf4", 64, True)
    tensors = {name: tensor.clone() for name, tensor in to_tensors(q, "w").items()}
    (folder / "state.json").write_bytes(bytes(tensors.pop("w.quant_state.bitsandbytes__nf4").tolist()))
    save_file(tensors, folder / "rest.safetensors")


def _read_quantised(path: Path) -> Any:
    from safetensors.torch import load_file

    tensors = load_file(path.parent / "rest.safetensors")
    state = torch.tensor(list(path.read_bytes()), dtype=torch.uint8)
    return from_tensors(tensors | {"w.quant_state.bitsandbytes__nf4": state}, "w")


MARKED = {"application": ownership.RUN, "scratch": f".qlora-lab-{'0' * 32}"}
RECORD = {"clock": "2026-11-26T12:00:00", "steps": 3, "base_sha256": "0" * 64, "adapter": {"r": 2}}
LOG = "".join(f'{{"step": {step}, "loss": 2.5, "tokens": 9, "seconds": 0.1}}\n' for step in (1, 2))
EXAMPLE = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}], "extra": [1.5]}

NOTEBOOK = {"cells": [{"cell_type": "code", "id": "a", "source": ["my_offset = 1"]}], "nbformat": 4}

READERS: dict[str, Reader] = {
    "notebook": Reader("01_codebook.ipynb", _write("01_codebook.ipynb", NOTEBOOK), read_submission),
    "any object": Reader("any.json", _write("any.json", {"x": [1, 2.5, None, True, {"b": "c"}]}), read_json),
    "plan": Reader("plan.json", _plan, load_plan),
    "quantised tensor": Reader("state.json", _quantised, _read_quantised, (ValueError, KeyError)),
    "examples, lines": Reader("data.jsonl", _write("data.jsonl", f"{json.dumps(EXAMPLE)}\n" * 2), read_examples),
    "examples, list": Reader("data.json", _write("data.json", [EXAMPLE] * 2), read_examples),
    "mark": Reader(ownership.MARK, _write(ownership.MARK, MARKED), lambda path: ownership.scratch_name(path.parent)),
    "run's record": Reader(
        "settings.json", _write("settings.json", RECORD), lambda path: run_record._stored_clock(path)
    ),
    "checkpoint": Reader("checkpoints/step-00000003/state.json", _checkpoint, _read_state),
    "log": Reader("log.jsonl", _write("log.jsonl", LOG), lambda path: read_log(path, 2)),
    "results": Reader(
        "rows.jsonl", _write("rows.jsonl", f"{json.dumps(_row())}\n" * 2), read_results, (*MISTAKES, UserWarning)
    ),
    "source note": Reader("source.json", _write("source.json", {"source": "wheel"}), lambda p: _source_note(p.parent)),
    "config.json": Reader("config.json", copy_model, lambda path: fields_of(path.parent)),
    "config.json, sizes": Reader("config.json", copy_model, shape_of),
    "index": Reader("model.safetensors.index.json", copy_model, lambda path: weight_files(path.parent)),
    "weights": Reader("model-00001-of-00003.safetensors", copy_model, lambda path: resolve(path.parent)),
    "adapter_config.json": Reader("adapter_config.json", _adapter, _read_adapter, cheap=False),
    "adapter": Reader("adapter_model.safetensors", _adapter, _read_adapter, cheap=False),
    "config.json, model": Reader(
        "config.json", copy_model, lambda path: empty_model(resolve(path.parent), torch.float32), cheap=False
    ),
    "generation_config.json": Reader(
        "generation_config.json",
        copy_model,
        lambda path: empty_model(resolve(path.parent), torch.float32),
        cheap=False,
    ),
    **{
        name: Reader(name, copy_model, lambda path: tokenizer_of(resolve(path.parent)), cheap=False)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    },
}
