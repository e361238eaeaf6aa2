"""The training loop: examples in, a trained adapter and its log out.

In: a model with adapters, its tokenizer, and data (a name, a file, or examples). Out: a Run, and in the folder `out`:
    adapter/      the adapter in PEFT's format          log.jsonl   one line a step: loss, tokens, speed, gradient norm
    settings.json what decided the run
Source: QLoRA section 4 and appendix B: AdamW, constant learning rate 2e-4, gradient norm clipped at 0.3.

The loss of a step is the mean over all answer tokens of its batch. The same seed, dtype and machine give the same run.
An interrupt (Ctrl-C) saves what was learned so far; a run that fails leaves an earlier run in its folder as it was.
Not here: resuming, accumulation, schedules, evaluation (the measure room).
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from qlora_lab.finetune.allocator import recycle_memory
from qlora_lab.finetune.batches import Batches
from qlora_lab.finetune.data import EncodeReport, collate, encode_all, load_data, pad_token_id
from qlora_lab.finetune.examples import Example
from qlora_lab.finetune.linear4bit import Linear4bit
from qlora_lab.finetune.lora import adapters
from qlora_lab.finetune.loss import answer_loss
from qlora_lab.finetune.modes import mode
from qlora_lab.finetune.peft_format import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_FILES = ("adapter", "log.jsonl", "settings.json")


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; each default with its reason."""

    steps: int = 60  # four to seven minutes for SmolLM2-135M on two cores
    batch_size: int = 8
    lr: float = 2e-4  # the paper's, for 7B and 13B
    clip: float = 0.3  # the paper's largest gradient norm
    max_length: int = 256  # tokens; longer examples are left out, and counted: memory follows the longest
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "max_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: it is a whole number of at least 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} is not allowed: it is a number above 0")


@dataclass(frozen=True)
class Run:
    """What a run did. losses: nats per answer token, one a step."""

    folder: Path
    settings: Settings
    data: EncodeReport
    losses: list[float] = field(repr=False)
    seconds: float
    tokens: int

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / "adapter"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def finetune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: str | Path | Sequence[Example] = "docstrings",
    steps: int = Settings.steps,
    out: str | Path = "runs/first",
    *,
    batch_size: int = Settings.batch_size,
    lr: float = Settings.lr,
    clip: float = Settings.clip,
    max_length: int = Settings.max_length,
    seed: int = Settings.seed,
    overwrite: bool = False,
    progress: bool = True,
) -> Run:
    """Train the adapters of `model` for `steps` steps and save them to `out`/adapter.

    data: "docstrings", a JSONL file (Alpaca, ShareGPT or OpenAI messages), or examples. lr: of AdamW, constant.
    clip: largest gradient norm. max_length: in tokens; longer examples are left out. overwrite: replace an earlier run
    in `out`; without it such a run is an error. Training flags and the random state are left as they were.
    Raises ValueError for a setting that is not allowed or data without an example, FileExistsError for an earlier run,
    FloatingPointError for a loss or gradient that is not finite, with the step.
    """
    settings = Settings(steps, batch_size, lr, clip, max_length, seed)
    adapters(model)  # raises before any work if there is none
    check_free(out, overwrite)
    examples = load_data(data) if isinstance(data, (str, Path)) else list(data)
    order = np.random.default_rng(seed).permutation(len(examples))  # a fair sample, should not all be needed
    shuffled = [examples[i] for i in order]
    encoded, report = encode_all(shuffled, tokenizer, max_length, enough=steps * batch_size)
    recycle_memory()
    start, lines = time.perf_counter(), []
    with _replacing_run(Path(out)) as folder:
        (folder / "settings.json").write_text(json.dumps(_record(model, settings, report), indent=2) + "\n")
        try:
            with mode(model, training=True), torch.random.fork_rng(), (folder / "log.jsonl").open("w") as log:
                torch.manual_seed(seed)  # dropout draws from it
                for line in _train(model, encoded, pad_token_id(tokenizer), settings, progress):
                    lines.append(line)
                    log.write(json.dumps(line) + "\n")
                    log.flush()  # a run that is killed keeps the log of every step it made
        except KeyboardInterrupt:
            if lines:
                save_adapter(model, folder / "adapter")  # what was learned until then
            raise
        save_adapter(model, folder / "adapter")
    losses, tokens = [line["loss"] for line in lines], sum(line["tokens"] for line in lines)
    return Run(folder, settings, report, losses, time.perf_counter() - start, tokens)


def _train(model, encoded, pad_id, settings: Settings, progress: bool) -> Iterator[dict[str, float]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # no weight decay: it would pull the product B A, not the weight, towards zero
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
    batches = Batches(len(encoded), settings.batch_size, settings.seed)
    bar = tqdm(range(1, settings.steps + 1), "training", unit="step", disable=not progress)
    try:
        for step in bar:
            batch = collate([encoded[i] for i in next(batches)], pad_id)
            line = {"step": step} | _step(model, batch, parameters, optimizer, settings, step)
            bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{line['tokens_per_second']:.0f}")
            yield line
    finally:  # also after an interrupt in mid-step: the next run must not add to these gradients
        optimizer.zero_grad(set_to_none=True)


def _step(model, batch, parameters, optimizer, settings: Settings, step: int) -> dict[str, float]:
    start = time.perf_counter()
    tokens = int(batch["attention_mask"].sum())
    optimizer.zero_grad(set_to_none=True)
    summed, count = answer_loss(model, batch)
    loss = summed / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; nothing was updated by this step. "
            f"Try dtype float32 or bf16 instead of fp16, or lr below {settings.lr}"
        )
    optimizer.step()
    seconds = time.perf_counter() - start
    return {
        "loss": loss.item(),
        "gradient_norm": norm.item(),
        "tokens": tokens,
        "answer_tokens": count,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def check_free(out: str | Path, overwrite: bool = False) -> None:
    """Raise FileExistsError if `out` holds a run that may not be overwritten, or is a file."""
    if Path(out).is_file():
        raise FileExistsError(f"{out} is a file: name a folder for the run")
    if (Path(out) / "adapter").exists() and not overwrite:
        message = "choose another folder, or overwrite it (overwrite=True; --overwrite on the command line)"
        raise FileExistsError(f"{out} holds an earlier run: {message}")


@contextmanager
def _replacing_run(folder: Path) -> Iterator[Path]:
    """Yields `folder`; an earlier run in it is set aside, and put back if the new one saves no adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".earlier-", dir=folder))
    earlier = [name for name in RUN_FILES if (folder / name).exists()]
    for name in earlier:
        (folder / name).rename(aside / name)
    try:
        yield folder
    finally:
        if "adapter" in earlier and not (folder / "adapter").exists():
            for name in earlier:
                (aside / name).replace(folder / name)
        shutil.rmtree(aside, ignore_errors=True)


def _record(model, settings: Settings, report: EncodeReport) -> dict:
    """All that decided the run, for settings.json."""
    layers = adapters(model)
    layer = next(iter(layers.values()))
    return asdict(settings) | {
        "model": getattr(model, "name_or_path", None),
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
        "device": str(layer.lora_A.device),
        "weights": str(layer.base.weight) if isinstance(layer.base, Linear4bit) else "not quantised",
        "adapter": {"r": layer.r, "alpha": layer.alpha, "dropout": layer.dropout.p, "layers": len(layers)},
        "data": asdict(report),
    }
