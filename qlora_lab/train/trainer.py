"""The training loop: examples in, a trained adapter and its log out. loop.py shows the idea on one screen.

In: a model with adapters, its tokenizer, and data (a name, a file, or examples). Out: a Run, and a folder with the
adapter, a log and checkpoints (run_folder.py).
Source: QLoRA section 4 and appendix B: AdamW, constant learning rate 2e-4, gradient norm clipped at 0.3.

The loss of a step is the mean over all answer tokens of its batch, however the batch is cut into rows, micro-batches
and processes. What a step draws at random follows from (seed, step, process) alone. So the same seed, dtype and machine
give the same run, and a run that was killed and resumed gives the same bits as an uninterrupted one.
Not here: the state between steps (run_state.py), more processes (distributed.py).
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.adapter import learned, method_of
from qlora_lab.adapters.peft_format import save_adapter
from qlora_lab.data.batches import Batches, collate_rows, to_rows
from qlora_lab.data.dataset import IGNORED, Encoded, encode_all, encode_held_out, load_data
from qlora_lab.data.examples import Examples, last_answer_only
from qlora_lab.files import disk
from qlora_lab.files.out_path import check_outside_model, out_folder
from qlora_lab.model.loaded import check_pair
from qlora_lab.model.modes import checkpointing, mode, own_draws
from qlora_lab.optim.master_copies import MasterCopies
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.train.allocator import recycle_memory
from qlora_lab.train.check_run import check_method
from qlora_lab.train.checkpoint import BEST, saved_steps
from qlora_lab.train.cost import Meter, total
from qlora_lab.train.distributed import (
    OneProcess,
    failing_together,
    from_process_0,
    is_process_0,
    on_process_0,
)
from qlora_lab.train.engines import engine_for
from qlora_lab.train.failures import explaining_errors, last_saved, where_not_finite
from qlora_lab.train.identity import adopt_arithmetic, arithmetic, own_threads
from qlora_lab.train.interrupt import Interrupt, waiting
from qlora_lab.train.limits import check_length, check_pictures, check_tokens, fill_id, used_tokens
from qlora_lab.train.loop import shuffled, step_seed
from qlora_lab.train.lora_plus import rate_groups, set_rates
from qlora_lab.train.loss import accumulate, summed_loss
from qlora_lab.train.packed_rows import check_packing
from qlora_lab.train.run_folder import ADAPTER, LOG, replacing_run, reserved_run, rewind, write_result
from qlora_lab.train.run_options import DataOptions
from qlora_lab.train.run_record import record, run_clock
from qlora_lab.train.run_state import Run, RunState, check_trained
from qlora_lab.train.settings import Settings, check_held_out, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPPED = "asked to stop"


def finetune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: str | Path | Iterable = "docstrings",
    steps: int = Settings.steps,
    out: str | Path = "runs/first",
    **options: Any,
) -> Run:
    """Train the adapters of `model` for `steps` steps and save them to `out`/adapter.

    data: "docstrings", a file, a list of dicts or examples, or a data set of `datasets`: see `load_data`.
    options: any field of Settings, such as lr=1e-4 or batch_size=16; resume, overwrite and other_arithmetic, as in
    OutputOptions (run_options.py); and: held_out: data like `data`, for evaluations every `eval_every` steps, which it
    needs. skip_bad: leave out records that cannot be used; Run.data.skipped holds their places and reasons. progress:
    show progress bars. Training flags and the random state are left as they were.
    Raises ValueError for a setting that is not allowed, data without an example, a token without an embedding, an
    example longer than the model's table of positions, packing in a model whose rows leak, `out` in the model's folder,
    or a resume with other settings, data, model or adapter; FileExistsError for an earlier run, and for a file of
    another origin under one of a run's names; BlockingIOError while another process writes to `out`; FloatingPointError
    for a loss or gradient that is not finite, with step, layer and dtype; OSError for a full disk and OutOfMemory, with
    what is saved; KeyboardInterrupt for Ctrl-C, SIGTERM or SIGHUP, once everything is saved.
    Warns of examples longer than a model with computed positions was made for, and of held-out ones over max_length.
    """
    asked = {name: options.pop(name) for name in SETTINGS if name in options}
    return Training(model, tokenizer, data, out, Settings(steps=steps, **asked), **options).run()


class Training:
    """A run made step by step: iterate over it for each step's line of the log, or call `run` to make all steps.

    Arguments and errors are those of `finetune`. After the last step `result` is the Run. stop() ends the run after the
    current step; what was learned is saved, and a resume continues from there.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        data: str | Path | Iterable = "docstrings",
        out: str | Path = "runs/first",
        settings: Settings = Settings(),  # noqa: B008 - frozen
        *,
        held_out: Iterable = (),
        resume: bool | int = False,
        overwrite: bool = False,
        other_arithmetic: bool = False,
        skip_bad: bool = DataOptions.skip_bad,
        progress: bool = True,
    ):
        check_pair(model, tokenizer)
        check_trained(model)
        check_method(method_of(model), settings)
        self.folder = out_folder(out)
        check_outside_model(self.folder / ADAPTER, getattr(model, "name_or_path", None))
        with failing_together(), reserved_run(self.folder, overwrite, resume) if is_process_0() else nullcontext():
            pass  # the folder is free, and an earlier run that a kill had moved away is back in its place
        held_out = load_data(held_out, skip_bad=skip_bad, progress=progress) if held_out else []
        check_held_out(settings, held_out)
        self.model, self.settings = model, settings
        self.resume, self.overwrite = resume, overwrite
        self.other_arithmetic = other_arithmetic
        self.progress = progress
        self.result: Run | None = None
        self._interrupt = Interrupt()
        self._begun = False  # a Training runs once
        self._engine = OneProcess(model)  # until the run begins
        self._state: RunState | None = None  # until the run begins
        self._meter = Meter(next(iter(learned(model).values())).device)
        examples = load_data(data, skip_bad=skip_bad, progress=progress)
        if settings.last_answer_only:
            examples, held_out = last_answer_only(examples), last_answer_only(held_out)
        needed = settings.steps * settings.batch_size  # examples; encoding takes about 1 ms each
        self._clock = run_clock(self.folder, tokenizer, resume)  # for templates that write the date
        how = {"progress": progress, "clock": self._clock}
        drawn = Examples(shuffled(examples, settings.seed), skip_bad=skip_bad)
        self._encoded, encoding = encode_all(drawn, tokenizer, settings.max_length, needed, **how)
        self.report = replace(encoding, skipped=(*examples.skipped, *encoding.skipped))
        held_out = Examples(held_out, skip_bad=skip_bad)
        figure = "the evaluations during training"
        self._held_out = encode_held_out(held_out, tokenizer, settings.max_length, figure, **how) if held_out else []
        self._check_readable(tokenizer)
        self._pad_id = fill_id(model, tokenizer)

    def _check_readable(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise ValueError if the model cannot read the examples, or mixes those that are packed into one row."""
        everything = [*self._encoded, *self._held_out]
        check_tokens(self.model, tokenizer, used_tokens(everything))
        longest = max(len(example.input_ids) for example in everything)
        check_length(self.model, longest, "an example", "leave it out by a lower max_length (--max-length)")
        check_pictures(self.model, everything)
        if self.settings.packing:
            check_packing(self.model, self._encoded, self.settings.max_length)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log so far, one per step."""
        return self._state.lines if self._state else []

    def run(self) -> Run:
        """Make all steps that are left. Raises KeyboardInterrupt after an interrupt, once everything is saved."""
        for _ in self:
            pass
        if self.result.ended == STOPPED:
            raise KeyboardInterrupt(f"{self.stopped} (--resume on the command line)")
        return self.result

    @property
    def stopped(self) -> str:
        """The message for a user who stopped the run."""
        done = f"stopped after step {len(self.lines)} of {self.settings.steps}"
        return f"{done}, all of it saved in {self.folder}: continue with resume=True"

    def stop(self) -> None:
        """End the run after the current step."""
        self._interrupt.asked = True

    # -------------------------------------------------------------------------------------------------------- all steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._begun:
            raise ValueError("this Training has already run: make a new one, with resume=True to continue")
        self._begun = True
        recycle_memory()  # page faults can cost more than the arithmetic of a step
        # It reads the whole base, so it comes before the engine, which may leave this process only a part of it.
        decided = record(self.model, self.settings, self.report, self._encoded, self._clock)
        with (
            checkpointing(self.model) if self.settings.gradient_checkpointing else nullcontext(),
            engine_for(self.model, self.settings.shard, self.settings.expert_parallel) as self._engine,
            ExitStack() as folder,
            own_threads(),
            waiting(self._interrupt),
        ):
            # If process 0 may not have the folder, all processes end.
            on_process_0(lambda: folder.enter_context(replacing_run(self.folder, self.overwrite, self.resume)))
            yield from self._steps(decided)

    def _steps(self, decided: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Begin or resume, make each step and log it, save when it is time, finish."""
        explained = partial(explaining_errors, folder=self.folder, settings=self.settings)
        with explained("before the first step"):
            self._begin(decided)
        state = self._state
        quiet = not (self.progress and is_process_0())
        bar = tqdm(total=self.settings.steps, initial=len(state.lines), desc="training", unit="step", disable=quiet)
        try:
            with bar, disk.open_for(self.folder / LOG, "ab") if is_process_0() else nullcontext() as log:
                ended = None
                while ended is None:
                    step = len(state.lines) + 1
                    with explained(f"in step {step}"):
                        line = self._step(step)
                        if log:
                            # Without a buffer, so that a killed run keeps the log of every step it made.
                            disk.write_all(log, json.dumps(line, allow_nan=False).encode() + b"\n")
                    state.lines.append(line)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{line['tokens_per_second']:.0f}")
                    bar.update()
                    yield line  # the caller may look at the model, or call stop()
                    ended = self._ended()
                    every = self.settings.save_every
                    if ended == STOPPED or (ended is None and every and step % every == 0):
                        with explained(f"after step {step}"):
                            on_process_0(lambda: state.save(self.folder, self.settings.keep))
            with explained("after the last step"):
                self._finish(ended)
        finally:  # also after an error in mid-step: the next run must not add to these gradients
            state.optimizer.zero_grad(set_to_none=True)

    def _step(self, step: int) -> dict[str, Any]:
        """Make one step. Returns its line of the log."""
        start = self._meter.read()
        settings, state, engine = self.settings, self._state, self._engine
        optimizer, scaler = state.optimizer, state.scaler  # the scaler does nothing but in float16
        examples = [self._encoded[i] for i in next(state.batches)]  # the same list on every process
        answer_tokens = sum(example.answer_tokens for example in examples)  # over all rows and processes
        micro_batches = self._micro_batches(examples)
        set_rates(optimizer, learning_rate(settings, step))
        optimizer.zero_grad(set_to_none=True)
        with mode(engine.model, training=True), own_draws(self.model):
            torch.manual_seed(step_seed(settings.seed, step, engine.rank))  # for dropout
            loss = accumulate(engine.model, micro_batches, answer_tokens, scaler.scale, engine.gradients)
        engine.finish(state.parameters)  # gradients of all processes
        (loss,) = engine.sum(loss)  # of all processes
        if all(p.grad is None for p in state.parameters):
            raise ValueError("no adapter got a gradient, so nothing would be learned: `qlora-lab doctor` says why")
        scaler.unscale_(optimizer)  # clip the true gradients, not the scaled ones
        norm = torch.nn.utils.clip_grad_norm_(state.parameters, settings.clip).item()
        # In float16 an infinite norm may only say that the scale is too high: the scaler then skips this update.
        overflow = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self._refuse(step, loss, norm, micro_batches)
        scaler.step(optimizer)
        scaler.update()  # halved after an overflow
        tokens = sum(len(example.input_ids) for example in examples)
        spent = self._meter.since(start, engine.sum)
        line = {
            "step": step,
            "loss": loss,  # nats per answer token
            "lr": optimizer.param_groups[0]["lr"],  # lora_A's, under LoRA+
            "gradient_norm": norm if math.isfinite(norm) else None,  # before clipping; JSON has no infinity
            "tokens": tokens,
            "answer_tokens": answer_tokens,
            "mean_length": tokens / len(examples),
            "tokens_per_second": tokens / spent["seconds"],
            **spent,
        }
        if settings.eval_every and (step % settings.eval_every == 0 or step == settings.steps):
            line["held_out_loss"] = self._evaluate(step)
        return line

    def _micro_batches(self, examples: list[Encoded]) -> list[dict[str, torch.Tensor]]:
        """The rows of this process, at most micro_batch_size at once; every process has equally many batches."""
        settings, engine = self.settings, self._engine
        rows = to_rows(examples, settings.max_length if settings.packing else None)  # without packing one example each
        rows += [[_silent(rows[0][0])]] * (-len(rows) % engine.size)  # processes wait for each other in every batch
        mine = rows[engine.rank :: engine.size]
        size = settings.micro_batch_size or len(mine)  # rows
        return [collate_rows(mine[start : start + size], self._pad_id) for start in range(0, len(mine), size)]

    def _evaluate(self, step: int) -> float:
        """The held-out loss; if it is the lowest so far, save the adapter as the best."""
        state = self._state
        loss = self._held_out_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: the held-out loss is {loss}; {last_saved(self.folder)}")
        if state.best["loss"] is None or loss < state.best["loss"]:
            state.best = {"loss": loss, "step": step, "since": 0}
            on_process_0(lambda: save_adapter(self.model, self.folder / BEST))
        else:
            state.best = state.best | {"since": state.best["since"] + 1}  # evaluations without improvement
        return loss

    def _held_out_loss(self) -> float:
        """Mean over all answer tokens; each process takes its share of the examples, in equally many batches."""
        engine, examples = self._engine, self._held_out
        mine = examples[engine.rank :: engine.size]
        mine += [_silent(examples[0])] * (engine.rank >= len(examples) % engine.size > 0)
        loss, labels = summed_loss(engine.model, mine, self.progress)
        loss, labels = engine.sum(loss, labels)  # divide once, after the sum
        return loss / labels

    def _ended(self) -> str | None:
        """Why the run is over after this step; None if it is not."""
        state = self._state
        if len(state.lines) == self.settings.steps:
            return "all steps"
        if self.settings.patience and state.best["since"] >= self.settings.patience:
            return "early stopping"
        (asked,) = self._engine.sum(float(self._interrupt.asked))  # a request to one process stops all
        return STOPPED if asked else None

    def _refuse(self, step: int, loss: float, norm: float, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """Raise FloatingPointError for a step whose loss or gradient is not finite, before it changes the adapter."""
        self._state.optimizer.zero_grad(set_to_none=True)
        self._engine.close()  # from here on each process looks for itself
        where = where_not_finite(self.model, micro_batches, self.settings.lr)
        effect = f"this step changed nothing, {last_saved(self.folder)}"
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; {effect}. {where}")

    # ---------------------------------------------------------------------------------------------- begin, save, finish

    def _begin(self, decided: dict[str, Any]) -> None:
        """Make the state before the first step, or after that of a checkpoint, and the folder that belongs to it."""
        settings = self.settings
        disk.make_folder(self.folder)
        lengths = [len(example.input_ids) for example in self._encoded] if settings.group_by_length else None
        batches = Batches(len(self._encoded), settings.batch_size, settings.seed, lengths)
        # The number of processes decides how sums are rounded.
        decided |= {"processes": self._engine.size}
        self._state = state = RunState(self.model, _optimizer(self.model, settings, self.folder), batches, decided)
        with failing_together():
            newest = max(saved_steps(self.folder), default=False)  # False: nothing to resume, so begin
            step = newest if self.resume is True else self.resume
            if step is not False:
                state.resume(self.folder, step, settings, self._encoded, self.other_arithmetic)
        # Processes with other settings, data or checkpoints would train a mixture.
        self._engine.agree(decided | {"the step to resume at": len(state.lines)})
        if self._engine.size > 1:  # each process ran a race of its own
            adopt_arithmetic(self.model, from_process_0(arithmetic(self.model)))
        decided |= {"arithmetic": arithmetic(self.model)}
        on_process_0(lambda: rewind(self.folder, state.lines, decided, settings.keep))

    def _finish(self, ended: str) -> None:
        """Save the adapter and, unless the run may go on, how it ended."""
        lines = self._state.lines
        losses = [line["loss"] for line in lines]
        tokens, seconds = (sum(line[name] for line in lines) for name in ("tokens", "seconds"))
        cost = total(lines)
        held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        with failing_together():
            if is_process_0():
                save_adapter(self.model, self.folder / ADAPTER)
                result = {"ended": ended, "steps": len(losses), "tokens": tokens, "seconds": seconds}
                result |= asdict(cost) | {"loss": losses[-1], "best": self._state.best}
                if ended != STOPPED:
                    write_result(self.folder, result)
        self.result = Run(self.folder, self.settings, self.report, losses, held_out, seconds, tokens, ended, cost)


SETTINGS = [name for name in signature(Settings).parameters if name != "steps"]


def _signature_in_full() -> Signature:
    """The keywords of `finetune`, each by its name: its own, those of Training, and the fields of Settings."""
    own = [p for p in signature(finetune).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    keywords = [p for p in signature(Training).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    fields = signature(Settings).parameters
    keywords += [fields[name].replace(kind=Parameter.KEYWORD_ONLY) for name in SETTINGS]
    return Signature([*own, *keywords], return_annotation=Run)


# For help(), editors and documentation. Each default stands once, in Training or Settings, which refuse other names.
finetune.__signature__ = _signature_in_full()


def _optimizer(model: torch.nn.Module, settings: Settings, folder: Path) -> torch.optim.Optimizer:
    make = torch.optim.AdamW
    if settings.optimizer_bits != 32 or settings.optimizer_budget is not None:
        # Pages go to the run's own disk: the system's temporary folder is often in memory.
        make = partial(PagedAdamW, bits=settings.optimizer_bits, budget=settings.optimizer_budget, folder=folder)
    # No weight decay: it would pull the product B A, not the weight, towards zero.
    make = partial(make, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
    groups = rate_groups(model, settings.lora_plus)
    parameters = groups[0]["params"]
    if len(groups) > 1 or all(p.dtype == torch.float32 for p in parameters):
        return make(groups)
    return MasterCopies(parameters, make)


def _silent(example: Encoded) -> Encoded:
    """The example with nothing to learn: a row for a process that would have none."""
    return replace(example, labels=[IGNORED] * len(example.labels))
