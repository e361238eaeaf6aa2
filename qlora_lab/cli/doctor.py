"""Check, before a run, for failures that raise no error, or with --machine a room's machine before a lesson."""

import argparse
import json

import qlora_lab as ql
from qlora_lab.cli.loading import add_adapters, add_model, load_model
from qlora_lab.cli.options import add_fields, common, from_arguments
from qlora_lab.train.run_options import AdapterOptions, DataOptions, ModelOptions
from qlora_lab.train.settings import Settings

EXAMPLE = "qlora-lab doctor --model smollm2-135m --data docstrings"
ADAPTER = ("method", "r", "targets", "source", "size", "virtual_tokens", "mlp", "parts", "start")
LESS_MEMORY = "use a lower --batch-size or --max-length"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser.add_argument_group("model"))
    data = parser.add_argument_group("data")
    add_fields(data, DataOptions, "data", "skip_bad")
    add_fields(data, Settings, "last_answer_only", "max_length", "packing")
    add_fields(parser.add_argument_group("run"), Settings, "batch_size", "seed")
    add_fields(parser.add_argument_group("adapter"), AdapterOptions, *ADAPTER)
    add_fields(parser.add_argument_group("optimizer"), Settings, "optimizer_bits")
    machine = parser.add_argument_group("machine")
    what = "check this machine for the course instead of a run, in about a minute: nothing is trained or downloaded, "
    what += "and the options of a run are ignored"
    machine.add_argument("--machine", action="store_true", help=what)
    kept = "with --machine: file for the report, as JSON; an earlier report there is replaced"
    machine.add_argument("--out", metavar="FILE", help=kept)
    common(parser.add_argument_group("output"))


def run(a: argparse.Namespace) -> int:
    if a.machine:
        return _machine(a)
    if a.out is not None:
        raise ValueError("--out saves the report of --machine: add --machine, or use --json for the report of a run")
    from qlora_lab.train.check_run import check_run

    settings = from_arguments(Settings, a)  # raises for a value that is not allowed
    check_run(from_arguments(ModelOptions, a), from_arguments(AdapterOptions, a), settings)
    data = ql.load_data(a.data, skip_bad=a.skip_bad, progress=not a.quiet)
    model, tokenizer = load_model(a)
    add_adapters(a, model, tokenizer)  # alpha and dropout keep their defaults
    report = ql.diagnose(model, tokenizer, data, settings, skip_bad=a.skip_bad, progress=not a.quiet)
    print(json.dumps(report.to_dict()) if a.json else f"{report}\n\n{report.dtypes}")
    return 0 if report.ok else 1


def _machine(a: argparse.Namespace) -> int:
    from qlora_lab.doctor.machine import check_machine, check_report_path, save_report

    if a.out is not None:
        check_report_path(a.out)  # before a minute is spent
    report = check_machine(ql.__version__, progress=not a.quiet)
    if a.out is not None:
        save_report(a.out, report)
    print(json.dumps(report.to_dict()) if a.json else report)
    return 0 if report.ok else 1
