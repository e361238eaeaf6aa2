"""The training loop: examples in, a trained adapter and its log out.

In: a model with adapters, its tokenizer, and data (a name, a file, or examples). Out: a Run, and a folder with the
adapter, a log and checkpoints (run_folder.py).
Source: QLoRA section 4 and appendix B: AdamW, constant learning rate 2e-4, gradient norm clipped at 0.3.

The loss of a step is the mean over all answer tokens of its batch, however the batch is cut into rows, micro-batches
and processes. What a step draws at random follows from (seed, step, process) alone. So the same seed, dtype and machine
give the same run, and a run that was killed and resumed is the same run, bit for bit.
Not here: what a batch is (batches.py), more processes (distributed.py), what answers are worth (the measure room).
"""

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.lora import adapters
from qlora_lab.adapters.peft_format import adapter_tensors, save_adapter
from qlora_lab.data.batches import Batches, collate_rows, to_rows
from qlora_lab.data.dataset import IGNORED, Encoded, EncodeReport, encode_all, load_data
from qlora_lab.data.examples import Example
from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, log_sha256, replace_sums, sha256
from qlora_lab.files.replace import replacing_file
from qlora_lab.model.modes import checkpointing, mode, own_draws
from qlora_lab.model.out_of_memory import telling_memory
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.train.allocator import recycle_memory
from qlora_lab.train.checkpoint import (
    BEST,
    facts_path,
    forget,
    load_checkpoint,
    restore_best,
    save_checkpoint,
    saved_steps,
    tensors_path,
)
from qlora_lab.train.distributed import engine_for, from_process_0, leads, together
from qlora_lab.train.identity import (
    adopt_arithmetic,
    arithmetic,
    first_elements_checksum,
    for_comparison,
    is_known,
    own_threads,
)
from qlora_lab.train.interrupt import Interrupt, waiting
from qlora_lab.train.limits import check_length, check_tokens, fill_id, used_tokens
from qlora_lab.train.loss import accumulate, summed_loss
from qlora_lab.train.nonfinite import first_nonfinite
from qlora_lab.train.packed_rows import check_packing
from qlora_lab.train.restored import check_tensors
from qlora_lab.train.resumed import check_facts, read_log
from qlora_lab.train.run_folder import ADAPTER, LOG, RECORD, RESULT, WEIGHTS_FILES, replacing_run, reserved_run
from qlora_lab.train.run_record import (
    comparable,
    computes_in,
    differences,
    obstacles,
    record,
    run_clock,
)
from qlora_lab.train.settings import Settings, check_held_out, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPPED = "asked to stop"


@dataclass(frozen=True)
class Run:
    """What a run did. losses: nats per answer token, one a step. held_out: (step, loss) of each evaluation."""

    folder: Path
    settings: Settings
    data: EncodeReport
    losses: list[float] = field(repr=False)
    held_out: list[tuple[int, float]] = field(repr=False)
    seconds: float  # of all steps; a resumed run counts those before as well
    tokens: int
    ended: str  # "all steps", "no better for a while" (early stopping), or STOPPED: it can be resumed

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / ADAPTER

    @property
    def best(self) -> Path:
        """The folder of the adapter with the lowest held-out loss; the last one's, had the run no evaluation."""
        return self.folder / BEST if self.held_out else self.adapter

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
    held_out: Sequence[Example] = (),
    resume: bool | int = False,
    overwrite: bool = False,
    other_arithmetic: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train the adapters of `model` for `steps` steps and save them to `out`/adapter.

    data: "docstrings", a JSONL file (Alpaca, ShareGPT or OpenAI messages), or examples. settings: fields of Settings,
    such as lr=1e-4 or batch_size=16. held_out: examples for evaluations, every `eval_every` steps.
    resume: go on from the newest checkpoint in `out`, or from that of a step; where no run was begun, begin.
    overwrite: replace an earlier run in `out`; without either such a run is an error. other_arithmetic: resume also
    with other versions or another processor, which changes the last bits. Training flags and the random state are left
    as they were.
    Raises ValueError for a setting that is not allowed, data without an example, a token without an embedding, an
    example longer than the model's table of positions, packing in a model whose rows leak, or a resume with other
    settings, data, model or adapter; FileExistsError for an earlier run, and for what no run wrote under one of its
    names; BlockingIOError while another process writes to `out`; FloatingPointError for a loss or gradient that is not
    finite, with step, layer and dtype; OSError for a full disk and OutOfMemory, with what is saved; KeyboardInterrupt
    for Ctrl-C, SIGTERM or SIGHUP, when all is saved.
    Warns of examples longer than a model with computed positions was made for.
    """
    options = {"held_out": held_out, "resume": resume, "overwrite": overwrite, "progress": progress}
    options["other_arithmetic"] = other_arithmetic
    return Training(model, tokenizer, data, out, Settings(steps=steps, **settings), **options).run()


class Training:
    """A run that is made step by step: iterate over it, each item is a step's line of the log; `run` does it all.

    Arguments and errors are those of `finetune`. After the last step `result` is the Run. stop() ends it after the step
    that is being made; what was learned is saved, and a resume goes on from there.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        data: str | Path | Sequence[Example] = "docstrings",
        out: str | Path = "runs/first",
        settings: Settings = Settings(),  # noqa: B008 - frozen
        *,
        held_out: Sequence[Example] = (),
        resume: bool | int = False,
        overwrite: bool = False,
        other_arithmetic: bool = False,
        progress: bool = True,
    ):
        _check_trained(model)
        with together(), reserved_run(out, overwrite, resume) if leads() else nullcontext():
            pass  # it is free, and an earlier run that a kill had moved away is in its place
        check_held_out(settings, held_out)
        self.model, self.settings, self.folder = model, settings, Path(out)
        self.overwrite, self.resume, self.accept = overwrite, resume, other_arithmetic
        self.progress, self.result = progress, None
        examples = load_data(data, progress=progress) if isinstance(data, (str, Path)) else list(data)
        order = np.random.default_rng(settings.seed).permutation(len(examples))  # a fair sample, if not all are needed
        shuffled, enough = [examples[i] for i in order], settings.steps * settings.batch_size
        self._clock = run_clock(self.folder, tokenizer, resume)
        options = {"progress": progress, "clock": self._clock}
        self._encoded, self.report = encode_all(shuffled, tokenizer, settings.max_length, enough, **options)
        self._held_out = []
        if settings.eval_every:
            self._held_out, _ = encode_all(held_out, tokenizer, settings.max_length, **options)
        self._check_readable(tokenizer)
        self._pad_id = fill_id(model, tokenizer)
        self._lengths = [len(one.input_ids) for one in self._encoded] if settings.group_by_length else None
        self._interrupt, self._begun = Interrupt(), False

    def _check_readable(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise ValueError if the model cannot read the examples, or mixes those that are packed into one row."""
        everything = [*self._encoded, *self._held_out]
        check_tokens(self.model, tokenizer, used_tokens(everything))
        longest = max(len(example.input_ids) for example in everything)
        check_length(self.model, longest, "an example", "leave it out by a lower max_length (--max-length)")
        if self.settings.packing:
            check_packing(self.model, self._encoded, self.settings.max_length)

    def run(self) -> Run:
        """Make all steps that are left. Raises KeyboardInterrupt, when all is saved, if one came."""
        for _ in self:
            pass
        if self.result.ended == STOPPED:
            raise KeyboardInterrupt(f"{self.stopped} (--resume on the command line)")
        return self.result

    @property
    def stopped(self) -> str:
        """What to tell whoever stopped the run."""
        done = f"stopped after step {len(self.lines)} of {self.settings.steps}"
        return f"{done}, all of it saved in {self.folder}: go on with resume=True"

    def stop(self) -> None:
        """End the run after the step that is being made."""
        self._interrupt.asked = True

    def __iter__(self) -> Iterator[dict[str, float]]:
        if self._begun:
            raise ValueError("this Training was run before: make a new one, with resume=True to go on")
        self._begun = True
        recycle_memory()
        # before the engine: it may leave this process a part of the base only
        self._record = record(self.model, self.settings, self.report, self._encoded, self._clock)
        self._first_elements = first_elements_checksum(self.model)
        with (
            checkpointing(self.model) if self.settings.gradient_checkpointing else nullcontext(),
            engine_for(self.model, self.settings.shard) as self._engine,
            ExitStack() as folder,
            own_threads(),
            waiting(self._interrupt),
        ):
            with together():  # where process 0 must not have the folder, all of them end
                if self._leads():
                    folder.enter_context(replacing_run(self.folder, self.overwrite, self.resume))
            yield from self._lines()

    def _lines(self) -> Iterator[dict[str, float]]:
        with self._telling("before the first step"):
            self._begin()
        total, done = self.settings.steps, len(self.lines)
        bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=not self._leads(self.progress))
        try:
            with bar, disk.open_for(self.folder / LOG, "ab") if self._leads() else nullcontext() as log:
                ended = None
                while ended is None:
                    with self._telling(f"in step {len(self.lines) + 1}"):
                        line = self._line(len(self.lines) + 1)
                        if log:
                            # without a buffer: a run that is killed keeps the log of every step it made
                            disk.write_all(log, json.dumps(line, allow_nan=False).encode() + b"\n")
                    self.lines.append(line)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{line['tokens_per_second']:.0f}")
                    bar.update()
                    yield line
                    ended = self._ended()
                    every = self.settings.save_every
                    if ended == STOPPED or (ended is None and every and line["step"] % every == 0):
                        with self._telling(f"after step {line['step']}"):
                            self._save()
            with self._telling("after the last step"):
                self._finish(ended)
        finally:  # also after an error in mid-step: the next run must not add to these gradients
            self._optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------------------------------------- begin, save, finish

    def _begin(self) -> None:
        """Everything as it is before the first step, or as a checkpoint has it."""
        settings = self.settings
        disk.make_folder(self.folder)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = _optimizer(self._parameters, settings, self.folder)
        device = self._parameters[0].device.type
        # float16 ends at 65,504 and loses what is below 6e-8: gradients are computed on a scaled loss
        self._scaler = torch.amp.GradScaler(device, enabled=computes_in(self.model) == torch.float16)
        self._batches = Batches(len(self._encoded), settings.batch_size, settings.seed, self._lengths)
        self._record |= {"processes": self._engine.size}  # in another number of parts sums are rounded otherwise
        self.lines, self._best = [], {"loss": None, "step": 0, "since": 0}
        with together():
            if self.resume is not False and (steps := saved_steps(self.folder)):
                self._restore(steps[-1] if self.resume is True else self.resume)
            elif self.resume is not False and self.resume is not True:
                load_checkpoint(self.folder, self.resume)  # raises: there is none
        self._engine.agree(self._record | {"the step to resume at": len(self.lines)})
        if self._engine.size > 1:  # each process ran a race of its own
            adopt_arithmetic(self.model, from_process_0(arithmetic(self.model)))
        self._record |= {"arithmetic": arithmetic(self.model)}
        with together():
            if self._leads():
                step, steps = len(self.lines), saved_steps(self.folder)
                if step:
                    restore_best(self.folder, step, self.folder / BEST)
                # newer ones would outlive the log that belongs to them; one too many is left by a kill within a save
                newer = [saved for saved in steps if saved > step]
                forget(self.folder, newer + [saved for saved in steps if saved <= step][: -self.settings.keep])
                disk.remove(self.folder / SUMS)  # of what is replaced now
                with replacing_file(self.folder / LOG) as new:  # without steps after the checkpoint, or half a line
                    disk.write_text(new, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines))
                with replacing_file(self.folder / RECORD) as new:
                    disk.write_text(new, json.dumps(self._record, indent=2) + "\n")
                disk.remove(self.folder / RESULT)
                replace_sums(self.folder, [RECORD])

    def _restore(self, step: int) -> None:
        tensors, facts = load_checkpoint(self.folder, step)
        check_facts(facts, facts_path(self.folder, step))
        if step >= self.settings.steps:
            made = f"{self.folder} was saved at step {step}, so steps={self.settings.steps} are made already"
            raise ValueError(f"{made}: ask for more of them")
        now = comparable(self._record)
        if not is_known(facts["arithmetic"]):  # nor was all of the base
            now |= {"base_sha256": self._first_elements}
        if lines := obstacles(comparable(facts["run"]), now, self._encoded):
            raise ValueError(
                f"{self.folder} holds another run, so it cannot be resumed: {'; '.join(lines)}. "
                "Ask for what it was begun with, or choose another folder"
            )
        self.lines = read_log(self.folder / LOG, step)
        if facts.get("log_sha256", digest := log_sha256(self.folder / LOG, step)) != digest:
            raise ValueError(f"{self.folder / LOG} is not what step {step} was saved with: restore it, or start anew")
        checked = adapter_tensors(self.model), self._parameters, self.settings.optimizer_bits
        check_tensors(tensors_path(self.folder, step), tensors, *checked)
        self._adopt(facts["arithmetic"])
        with torch.no_grad():
            for key, tensor in adapter_tensors(self.model).items():
                tensor.copy_(tensors[f"adapter.{key}"])
        state = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                state.setdefault(int(number), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._batches.restore(facts["batches"])
        self._scaler.load_state_dict(facts["scaler"])
        self._best = facts["best"]

    def _adopt(self, saved: dict) -> None:
        """Compute as the run did so far. Raises ValueError where that cannot be, unless it was accepted."""
        adopt_arithmetic(self.model, saved)
        if not is_known(saved):
            told = "was begun by an earlier version, which noted neither versions nor threads nor all of the base"
            warnings.warn(f"{self.folder} {told}: whether they are the same is not known", stacklevel=2)
        elif (lines := differences(for_comparison(saved), for_comparison(arithmetic(self.model)))) and not self.accept:
            raise ValueError(
                f"{self.folder} was begun with other arithmetic, so its last bits would differ: {'; '.join(lines)}. "
                "Go on all the same with other_arithmetic=True (--other-arithmetic on the command line)"
            )

    def _save(self) -> None:
        with together():
            if self._leads():
                disk.sync(self.folder / LOG)
                tensors = {f"adapter.{key}": tensor for key, tensor in adapter_tensors(self.model).items()}
                for number, state in self._optimizer.state_dict()["state"].items():
                    parts = {k: v for k, v in state.items() if not k.startswith("qmap")}  # tables, not state
                    tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in parts.items()}
                facts = {
                    "run": comparable(self._record),
                    "batches": self._batches.state(),
                    "scaler": self._scaler.state_dict(),
                    "best": self._best,
                    "arithmetic": arithmetic(self.model),
                    "log_sha256": sha256(self.folder / LOG),
                }
                best = self.folder / BEST if self._best["step"] else None
                save_checkpoint(self.folder, len(self.lines), tensors, facts, self.settings.keep, best)

    def _finish(self, ended: str) -> None:
        losses, tokens = [line["loss"] for line in self.lines], sum(line["tokens"] for line in self.lines)
        seconds = sum(line["seconds"] for line in self.lines)
        held_out = [(line["step"], line["held_out_loss"]) for line in self.lines if "held_out_loss" in line]
        with together():
            if self._leads():
                save_adapter(self.model, self.folder / ADAPTER)
                result = {"ended": ended, "steps": len(losses), "tokens": tokens, "seconds": seconds}
                result |= {"loss": losses[-1], "best": self._best}
                if ended != STOPPED:
                    self._write_result((json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
        self.result = Run(self.folder, self.settings, self.report, losses, held_out, seconds, tokens, ended)

    def _write_result(self, content: bytes) -> None:
        """The last file of a run: that it is there says that the run is complete, with checksums of all it made."""
        files = [self.folder / name / file for name in (ADAPTER, BEST) for file in WEIGHTS_FILES]
        made = [path.relative_to(self.folder).as_posix() for path in files if path.is_file()]
        replace_sums(self.folder, [RECORD, LOG, *made], {RESULT: content})
        with replacing_file(self.folder / RESULT) as new:
            disk.write_bytes(new, content)

    # ----------------------------------------------------------------------------------------------------------- a step

    def _line(self, step: int) -> dict[str, float]:
        """One step, and what the log says of it."""
        start, settings = time.perf_counter(), self.settings
        examples = [self._encoded[i] for i in next(self._batches)]
        micro_batches, answer_tokens = self._micro_batches(examples), sum(one.answer_tokens for one in examples)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        self._optimizer.zero_grad(set_to_none=True)
        with mode(self._engine.model, training=True), own_draws(self.model):
            # for dropout: what a step draws does not depend on how the run came here
            torch.manual_seed(np.random.SeedSequence([settings.seed, step, self._engine.rank]).generate_state(1)[0])
            around = self._engine.gradients
            loss = accumulate(self._engine.model, micro_batches, answer_tokens, self._scaler.scale, around)
        self._engine.finish(self._parameters)
        (loss,) = self._engine.sum(loss)
        if all(p.grad is None for p in self._parameters):
            raise ValueError("no adapter got a gradient, so nothing would be learned: `qlora-lab doctor` says why")
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, settings.clip).item()
        overflow = self._scaler.is_enabled() and not math.isfinite(norm) and self._scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self._not_finite(step, loss, norm, micro_batches)
        self._scaler.step(self._optimizer)  # after an overflow it does nothing, and the scale is halved
        self._scaler.update()
        tokens, seconds = sum(len(one.input_ids) for one in examples), time.perf_counter() - start
        line = {
            "step": step,
            "loss": loss,
            "lr": self._optimizer.param_groups[0]["lr"],
            "gradient_norm": norm if math.isfinite(norm) else None,  # JSON has no infinity
            "tokens": tokens,
            "answer_tokens": answer_tokens,
            "mean_length": tokens / len(examples),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        if settings.eval_every and (step % settings.eval_every == 0 or step == settings.steps):
            line["held_out_loss"] = self._evaluate(step)
        return line

    def _micro_batches(self, examples: list[Encoded]) -> list[dict[str, torch.Tensor]]:
        """The rows of this process, at most micro_batch_size at once; every process has as many batches."""
        settings, rank, size = self.settings, self._engine.rank, self._engine.size
        rows = to_rows(examples, settings.max_length if settings.packing else None)
        rows += [[_silent(rows[0][0])]] * (-len(rows) % size)
        mine = rows[rank::size]
        at_once = settings.micro_batch_size or len(mine)
        parts = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
        return [collate_rows(part, self._pad_id) for part in parts]

    def _evaluate(self, step: int) -> float:
        loss = self._held_out_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: the held-out loss is {loss}; {self._last_saved()}")
        if self._best["loss"] is None or loss < self._best["loss"]:
            self._best = {"loss": loss, "step": step, "since": 0}
            with together():
                if self._leads():
                    save_adapter(self.model, self.folder / BEST)
        else:
            self._best = self._best | {"since": self._best["since"] + 1}
        return loss

    def _held_out_loss(self) -> float:
        """Mean over all answer tokens; each process takes its share of the examples, in as many batches."""
        rank, size, examples = self._engine.rank, self._engine.size, self._held_out
        mine = examples[rank::size] + [_silent(examples[0])] * (rank >= len(examples) % size > 0)
        loss, labels = summed_loss(self._engine.model, mine, self.progress)
        loss, labels = self._engine.sum(loss, labels)
        return loss / labels

    def _ended(self) -> str | None:
        """Why the run is over after this step; None if it is not."""
        if len(self.lines) == self.settings.steps:
            return "all steps"
        if self.settings.patience and self._best["since"] >= self.settings.patience:
            return "no better for a while"
        (asked,) = self._engine.sum(float(self._interrupt.asked))  # one process that is asked is all of them
        return STOPPED if asked else None

    def _not_finite(self, step: int, loss: float, norm: float, batches: list[dict[str, torch.Tensor]]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._engine.close()  # from here on each process looks for itself
        with mode(self.model, training=True):
            where = next((found for batch in batches if (found := first_nonfinite(self.model, batch))), None)
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}; nothing was updated by this step, {self._last_saved()}. "
            f"First that is not finite: {where or 'not found again, so it was drawn (dropout) or is in the sum'}. "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        """What to change after a loss that is not finite, in Python and on the command line."""
        lower = f"lower lr={self.settings.lr} (--lr)"
        narrow = computes_in(self.model) != torch.float32
        return f"Load the model with dtype=torch.float32 (--dtype float32), or {lower}" if narrow else f"Try to {lower}"

    @contextmanager
    def _telling(self, when: str) -> Iterator[None]:
        """Memory or a disk that is full is told with what is saved, and what to do."""
        try:
            with telling_memory(lambda: f"out of memory {when}: {self._less_memory()}"):
                yield
        except OSError as error:
            if error.errno is None:  # it says so already
                raise
            where = f"{error.filename}: " if error.filename else ""
            said = f"the run ended {when} ({where}{error.strerror}): {self._last_saved()}"
            raise OSError(f"{said}. Mend that, then resume (resume=True; --resume on the command line)") from error

    def _less_memory(self) -> str:
        saved = saved_steps(self.folder)
        again = f"resume from step {saved[-1]} in {self.folder}" if saved else "nothing is saved yet: begin again"
        recompute = "gradient_checkpointing=True (--gradient-checkpointing)"
        smaller = "a lower micro_batch_size (--micro-batch-size) or max_length (--max-length)"
        if self.settings.gradient_checkpointing:
            return f"{again} where more is free, or begin a new run with {smaller}"
        return f"{again} with {recompute}, or begin a new run with {smaller}"

    def _last_saved(self) -> str:
        steps = saved_steps(self.folder)
        return f"the last checkpoint is step {steps[-1]} in {self.folder}" if steps else "there is no checkpoint yet"

    def _leads(self, also: bool = True) -> bool:
        """Whether this process writes files and shows progress."""
        return also and self._engine.rank == 0


def _check_trained(model: torch.nn.Module) -> None:
    """Raise ValueError for a model without adapters, or one that trains anything else, which would not be saved."""
    learned = {id(p) for layer in adapters(model).values() for p in (layer.lora_A, layer.lora_B)}
    if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in learned]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        message = "adapters alone are trained and saved: requires_grad_(False) freezes it"
        raise ValueError(f"{others[0]}{more} would be trained as well, but {message}")


def _optimizer(parameters: list[torch.nn.Parameter], settings: Settings, folder: Path) -> torch.optim.Optimizer:
    # no weight decay: it would pull the product B A, not the weight, towards zero
    make = torch.optim.AdamW
    if settings.optimizer_bits != 32 or settings.optimizer_budget is not None:
        # pages go to the run's own disk: the system's temporary folder is often in memory
        make = partial(PagedAdamW, bits=settings.optimizer_bits, budget=settings.optimizer_budget, folder=folder)
    return make(parameters, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)


def _silent(example: Encoded) -> Encoded:
    """The example with nothing to learn: a row for a process that would have none."""
    return Encoded(example.input_ids, [IGNORED] * len(example.labels))
