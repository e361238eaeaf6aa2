"""Train an adapter on a quantised model, and test it on held-out examples before and after."""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import qlora_lab as ql
from qlora_lab.cli.loading import add_adapters, add_model, is_first_process, load_model, print_note
from qlora_lab.cli.options import add_field, add_fields, common, from_arguments, one_line
from qlora_lab.cli.printing import report
from qlora_lab.data.examples import last_answer_only
from qlora_lab.train.run_options import AdapterOptions, DataOptions, ModelOptions, OutputOptions
from qlora_lab.train.settings import Settings, check_held_out

EXAMPLE = "qlora-lab finetune --model smollm2-135m --data docstrings --steps 60 --out runs/first"
LESS_MEMORY = "use --micro-batch-size 1, --gradient-checkpointing or a lower --max-length"
ADAPTER = [field.name for field in fields(AdapterOptions)]
PREVIEW = 3  # answers shown before and after training


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser.add_argument_group("model"))
    data = parser.add_argument_group("data")
    add_fields(data, DataOptions, "data")
    add_field(data, DataOptions, "test_data", metavar="FILE")
    add_fields(data, DataOptions, "held_out", "skip_bad")
    add_fields(data, Settings, "last_answer_only", "max_length", "packing", "group_by_length")
    batches = ("batch_size", "micro_batch_size", "gradient_checkpointing", "shard", "expert_parallel")
    add_fields(parser.add_argument_group("run"), Settings, "steps", *batches, "eval_every", "patience", "seed")
    add_fields(parser.add_argument_group("adapter"), AdapterOptions, *ADAPTER)
    rates = ("lr", "lora_plus", "schedule", "warmup_steps", "clip")
    add_fields(parser.add_argument_group("optimizer"), Settings, *rates, "optimizer_bits", "optimizer_budget")
    output = parser.add_argument_group("output")
    add_field(output, OutputOptions, "out", metavar="FOLDER")
    add_fields(output, OutputOptions, "overwrite")
    add_field(output, OutputOptions, "resume", nargs="?", const=True, metavar="STEP")
    add_fields(output, OutputOptions, "other_arithmetic")
    add_fields(output, Settings, "save_every", "keep")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.files.out_path import check_outside_model
    from qlora_lab.train.check_run import check_run  # torch is loaded here, after --help and the parser
    from qlora_lab.train.run_folder import reserved_run

    settings = from_arguments(Settings, a)  # raises for a value that is not allowed
    options = {"held_out": a.held_out, "resume": a.resume}
    check_run(from_arguments(ModelOptions, a), from_arguments(AdapterOptions, a), settings, **options)
    check_outside_model(Path(a.out) / "adapter", a.model)  # before the lock, which would lie in it
    with reserved_run(a.out, a.overwrite, a.resume) if is_first_process() else nullcontext():
        _finetune(a, settings)


def _finetune(a: argparse.Namespace, settings: Settings) -> None:
    from qlora_lab.data.dataset import usable
    from qlora_lab.measure.held_out import MAX_LENGTH
    from qlora_lab.model.fetch import resolve
    from qlora_lab.train.distributed import first_on_node, processes
    from qlora_lab.train.engines import check_several

    progress = not a.quiet
    # before the model: data are checked in seconds
    train = ql.load_data(a.data, skip_bad=a.skip_bad, progress=progress)
    test = _held_out_examples(a)
    check_held_out(settings, test if settings.eval_every else [])
    with processes() as rank:
        check_several(a.shard, a.expert_parallel)  # needs the process group
        first_on_node(lambda: resolve(a.model, progress=progress))  # one download per machine
        model, tokenizer = load_model(a)
        test = usable(test, tokenizer) if test and a.skip_bad else test
        evaluated = test if settings.eval_every else []  # during training; a test before and after needs no eval_every
        add_adapters(a, model, tokenizer)
        if not (a.json or a.quiet):  # other processes than the first are quiet
            from qlora_lab.doctor.dtype_policy import dtype_policy

            print(f"{dtype_policy(model, a.optimizer_bits)}\n")
        tests = bool(test) and rank == 0  # only the first process tests and prints
        # At least 512, so that runs with lower limits are judged on the same examples.
        tested = {"max_length": max(MAX_LENGTH, settings.max_length), "progress": progress}
        before = ql.held_out(model, tokenizer, test, **tested) if tests else None
        options = asdict(settings) | asdict(from_arguments(OutputOptions, a)) | {"skip_bad": a.skip_bad}
        result = ql.finetune(model, tokenizer, train, held_out=evaluated, progress=progress, **options)
        after = ql.held_out(model, tokenizer, test, **tested) if tests else None
        if tests and not a.json:
            _show_answers(test, before.answers, after.answers)
        if rank == 0:
            reasons = {"skipped": result.data.skipped} if a.json and a.skip_bad else {}
            report(a, _summary(result, before, after) | reasons)


def _held_out_examples(a: argparse.Namespace) -> list:
    if not a.held_out:
        return []
    source = a.data if a.test_data is None and a.data == "docstrings" else a.test_data
    if source is None:
        print_note(a, f"nothing is tested: {a.data} has no held-out examples; add --test-data FILE, or --held-out 0")
        return []
    split = "test" if source == "docstrings" else "train"  # a file has one split, and its name is train
    examples = ql.load_data(source, split, skip_bad=a.skip_bad, progress=not a.quiet)[: a.held_out]
    return last_answer_only(examples) if a.last_answer_only else examples


def _show_answers(examples: list, before: list[str], after: list[str]) -> None:
    for example, first, last in list(zip(examples, before, after, strict=True))[:PREVIEW]:
        print(f"\nwritten by a person  {example.answer}\nmodel, before        {one_line(first)}")
        print(f"model, after         {one_line(last)}")
    print()


def _summary(result, before, after) -> dict:
    figures = {
        "adapter": str(result.adapter),
        "ended": result.ended,
        "steps": len(result.losses),  # of this run and those before a resume
        "loss_first": result.losses[0],  # nats per answer token
        "loss_last": result.losses[-1],
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
        **asdict(result.cost),  # None for joules is null in JSON, with the reason beside it
        "examples_used": result.data.kept,
        "examples_too_long": result.data.too_long,
        "records_skipped": len(result.data.skipped),
    }
    if result.held_out:
        step, loss = min(result.held_out, key=lambda evaluation: evaluation[1])
        figures |= {"best_adapter": str(result.best), "best_step": step, "best_held_out_loss": loss}
    for name, test in (("before", before), ("after", after)):
        if test:
            figures |= {f"held_out_loss_{name}": test.loss, f"rouge_l_{name}": test.rouge_l}
    return figures
