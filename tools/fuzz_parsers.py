"""Every parser of this library that reads foreign input: files, tensors, templates, words of a command line.

Out: PARSERS, name -> Parser: good inputs, how to damage them, how to read them, which errors may be raised.
A parser of files first writes the bytes into a folder of its own. `weight` says how often a parser is drawn: those that
build or convert a model take ten times as long as the others.
Not here: damage (fuzz_damage.py), draws and counts (fuzz.py).
"""

import gzip
import hashlib
import io
import json
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qlora_lab import cli
from qlora_lab.data.chat_template import PLAIN_TEMPLATE
from qlora_lab.data.dataset import load_data
from qlora_lab.data.examples import to_example
from qlora_lab.data.labels import encode
from qlora_lab.export.xray import Checkpoint, scanned, values
from qlora_lab.model.empty_model import tokenizer_of
from qlora_lab.model.gguf_in import convert
from qlora_lab.model.load import load as load_model
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors
from qlora_lab.train import checkpoint
from qlora_lab.train.resumed import check_tensors
from tests.data.chat_templates import CASES
from tests.readers import MISTAKES, READERS, Reader, copy_model
from tools.fuzz_damage import in_json, in_lines, in_numbers, in_safetensors, in_words

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))  # their commands are good inputs


@dataclass(frozen=True)
class Parser:
    """good: takes an empty folder, which it may fill, and gives good inputs. read: takes one input and the folder."""

    good: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], Any]
    errors: tuple[type[BaseException], ...]
    structured: Callable[[bytes, Random], bytes]
    weight: float = 1.0


# --------------------------------------------------------------------------------------------------------------- files


def of_reader(reader: Reader) -> Parser:
    """Make a parser of one kind of file, from the table that the tests of JSON use."""

    def good(folder: Path) -> list[bytes]:
        return [reader.prepare(folder).read_bytes()]

    def read(content: bytes, folder: Path) -> Any:
        path = folder / reader.file
        path.write_bytes(content)
        return reader.read(path)

    kinds = {".jsonl": in_lines, ".safetensors": in_safetensors}
    weight = 1.0 if reader.cheap else 0.5
    return Parser(good, read, reader.errors, kinds.get(Path(reader.file).suffix, in_json), weight)


SHARD = "model-00001-of-00003.safetensors"


def _weights(folder: Path) -> list[bytes]:
    copy_model(folder)
    return [(folder / SHARD).read_bytes()]


def _read_weights(content: bytes, folder: Path) -> Any:
    (folder / SHARD).write_bytes(content)
    return load_model(folder, codebook="nf4", block_size=16, dtype=torch.float32, progress=False)


ADAPTER = {"a": torch.ones(2, 3), "b": torch.ones(4, 2)}
STEP = 3


def _checkpoint(folder: Path) -> list[bytes]:
    state = {f"adapter.{name}": tensor for name, tensor in ADAPTER.items()}
    for number, tensor in enumerate(ADAPTER.values()):
        moments = {"step": torch.tensor(3.0), "exp_avg": tensor.clone(), "exp_avg_sq": tensor.clone()}
        state |= {f"optimizer.{number}.{name}": part for name, part in moments.items()}
    path = checkpoint.save_checkpoint(folder, STEP, state, {"best": None}, keep=1)
    return [(path / checkpoint.TENSORS).read_bytes()]


def _read_checkpoint(content: bytes, folder: Path) -> Any:
    """Read a checkpoint whose checksums are right: what a careful forger would write."""
    step = checkpoint._folder(folder, STEP)
    (step / checkpoint.TENSORS).write_bytes(content)
    facts = hashlib.sha256((step / checkpoint.FACTS).read_bytes()).hexdigest()
    lines = [f"{facts}  {checkpoint.FACTS}\n", f"{hashlib.sha256(content).hexdigest()}  {checkpoint.TENSORS}\n"]
    (step / checkpoint.SUMS).write_text("".join(lines))
    tensors, _ = checkpoint.load_checkpoint(folder, STEP)
    return check_tensors(step / checkpoint.TENSORS, tensors, ADAPTER, list(ADAPTER.values()), 32)


def _sums(folder: Path) -> list[bytes]:
    _checkpoint(folder)
    return [(checkpoint._folder(folder, STEP) / checkpoint.SUMS).read_bytes()]


def _read_sums(content: bytes, folder: Path) -> Any:
    (checkpoint._folder(folder, STEP) / checkpoint.SUMS).write_bytes(content)
    return checkpoint.load_checkpoint(folder, STEP)


def _gguf(folder: Path) -> list[bytes]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.model.test_gguf_in import TOKENS, write_gguf

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), rope_parameters=ROPE, **shape))
    write_gguf(folder / "model.gguf", model)
    return [(folder / "model.gguf").read_bytes()]


_PACKED_EXAMPLE = {"messages": [{"role": role, "content": "a b"} for role in ("user", "assistant")]}


def _gzip(folder: Path) -> list[bytes]:
    return [gzip.compress(f"{json.dumps(_PACKED_EXAMPLE)}\n".encode() * 2, mtime=0)]


def _parquet(folder: Path) -> list[bytes]:
    from pyarrow import Table, parquet

    rows = Table.from_pylist([_PACKED_EXAMPLE] * 2)
    for compression in ("none", "snappy"):
        parquet.write_table(rows, folder / f"{compression}.parquet", compression=compression)
    return [(folder / f"{compression}.parquet").read_bytes() for compression in ("none", "snappy")]


def _read_data_in(name: str) -> Callable[[bytes, Path], Any]:
    def read(content: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return load_data(folder / name)

    return read


ROPE = {"rope_type": "default", "rope_theta": 100000.0}


def _read_gguf(content: bytes, folder: Path) -> Any:
    path, made = folder / "model.gguf", folder / "made"
    path.write_bytes(content)
    shutil.rmtree(made, ignore_errors=True)
    return convert(path, made, progress=False)


# ------------------------------------------------------------------------------------------------------------- tensors


def _quantised(folder: Path) -> list[bytes]:
    weight = torch.linspace(-1, 1, 800).reshape(40, 20)
    options = [("nf4", 64, False), ("nf4", 64, True), ("int3", 16, True), (torch.tensor([-0.9, 0.1, 0.7]), 64, False)]
    stored = [to_tensors(quantize(weight, *each), "w") for each in options]
    return [save({name: tensor.clone() for name, tensor in tensors.items()}) for tensors in stored]


def _read_quantised(content: bytes, folder: Path) -> Any:
    q = from_tensors(load(content), "w")
    assert dequantize(q, torch.float32).shape == q.shape
    return q


def _read_by_xray(content: bytes, folder: Path) -> Any:
    """Decode what has no fault, as from_tensors does; a fault is a refusal."""
    path = folder / "quantised.safetensors"
    path.write_bytes(content)
    checkpoint = Checkpoint(path)
    if faults := scanned(checkpoint, progress=False):
        raise ValueError(faults[0])
    for key, tensor in checkpoint.tensors.items():
        decoded = values(checkpoint, key, 0, tensor.numel)
        assert torch.equal(decoded, dequantize(from_tensors(load(content), key)).flatten())
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------- texts


@cache
def _tokenizer() -> Any:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    copy_model(folder)
    tokenizer = tokenizer_of(folder)
    shutil.rmtree(folder)
    return tokenizer


TALK = to_example({"messages": [{"role": role, "content": "a b"} for role in ("system", "user", "assistant")]})


def _templates(folder: Path) -> list[bytes]:
    """Templates of moderate length that end an answer with a token of the tokenizer here."""
    theirs = {case.template for case in CASES.values() if case.template and len(case.template) < 3000}
    texts = sorted({PLAIN_TEMPLATE} | theirs)
    readable = [text.encode() for text in texts if _is_read(text.encode(), folder)]
    assert PLAIN_TEMPLATE.encode() in readable
    return readable


def _is_read(content: bytes, folder: Path) -> bool:
    try:
        _read_template(content, folder)
    except ValueError:
        return False
    return True


def _read_template(content: bytes, folder: Path) -> Any:
    tokenizer = _tokenizer()
    tokenizer.chat_template = content.decode("utf-8", "replace")
    return encode(TALK, tokenizer)


def _commands(folder: Path) -> list[bytes]:
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.startswith("qlora-lab ")]
    return ["\0".join(shlex.split(line, comments=True)[1:]).encode() for line in lines]


_parser = cache(cli.build_parser)


def _read_command(content: bytes, folder: Path) -> Any:
    """Parse a command, and run it if it needs no model. A mistake is one line and exit code 2."""
    words = content.decode("utf-8", "surrogateescape").split("\0")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            arguments = _parser().parse_args(words)
            code = cli.main(words) if arguments.command == "memory" and "/" not in arguments.model else 0
        except SystemExit as stop:
            code = stop.code
    lines = err.getvalue().splitlines()
    assert code in (0, 1, 2) and len(lines) == (code == 2) and "Traceback" not in err.getvalue(), (code, lines)
    if code == 2:
        raise ValueError(lines[0])
    return code


PARSERS: dict[str, Parser] = {name: of_reader(reader) for name, reader in READERS.items()} | {
    "from_tensors": Parser(_quantised, _read_quantised, (KeyError, ValueError, SafetensorError), in_safetensors, 2.0),
    "X-ray": Parser(_quantised, _read_by_xray, (ValueError,), in_safetensors, 2.0),
    "checkpoint's tensors": Parser(_checkpoint, _read_checkpoint, MISTAKES, in_safetensors),
    "checksums": Parser(_sums, _read_sums, MISTAKES, in_lines),
    "a model's weights": Parser(_weights, _read_weights, MISTAKES, in_safetensors, 0.3),
    "gzip": Parser(_gzip, _read_data_in("data.jsonl.gz"), MISTAKES, in_numbers),
    "parquet": Parser(_parquet, _read_data_in("data.parquet"), MISTAKES, in_numbers),
    "GGUF": Parser(_gguf, _read_gguf, MISTAKES, in_numbers, 0.3),
    "chat template": Parser(_templates, _read_template, (ValueError,), in_words, 0.5),
    "command line": Parser(_commands, _read_command, (ValueError,), in_words, 1.0),
}
