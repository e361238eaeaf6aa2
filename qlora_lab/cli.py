"""The command line: parses, calls the library, prints. `qlora-lab COMMAND --help` shows an example of each.

Exit codes: 0 done; 2 a mistake in what was asked, told in one line; 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import qlora_lab as ql

MISTAKES = (ValueError, FloatingPointError, OSError)  # what the library raises on purpose, and ModelError
PREVIEW = 3  # answers shown before and after training


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    if getattr(arguments, "quiet", False):
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which is later than this
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"qlora-lab {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_mistake(error):
            raise
        print(f"qlora-lab {arguments.command}: {_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _is_mistake(error: Exception) -> bool:
    from qlora_lab.finetune.fetch import ModelError

    return isinstance(error, (*MISTAKES, ModelError))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------ commands


def fetch(a: argparse.Namespace) -> None:
    folder = ql.fetch(a.model, progress=not a.quiet)
    source = folder / "source.json"
    _report(a, {"model": a.model, "folder": str(folder)} | (json.loads(source.read_text()) if source.exists() else {}))


def generate(a: argparse.Namespace) -> None:
    model, tokenizer = _load(a)
    if a.adapter:
        ql.load_adapter(model, a.adapter)
    answer = ql.generate(model, tokenizer, a.question, a.max_new_tokens)
    print(json.dumps({"question": a.question, "answer": answer}) if a.json else answer)


def finetune(a: argparse.Namespace) -> None:
    from qlora_lab.finetune.lora import check_strength
    from qlora_lab.finetune.trainer import Settings, check_free
    from qlora_lab.quant.blocks import check_block_size

    # before the model is loaded: a mistyped word should not cost a minute
    settings = Settings(**{field.name: getattr(a, field.name) for field in fields(Settings)})
    check_free(a.out, a.overwrite)
    check_strength(a.alpha, a.dropout)
    check_block_size(a.block_size)
    for name, value, least in (("r", a.r, 1), ("held-out", a.held_out, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: it is at least {least}")
    train = ql.load_data(a.data)
    test = _held_out_examples(a)
    targets = a.targets[0] if len(a.targets) == 1 else a.targets  # "all-linear" is one word
    model, tokenizer = _load(a)
    ql.add_lora(model, a.r, a.alpha, a.dropout, targets, seed=a.seed)
    before = ql.held_out(model, tokenizer, test) if test else None
    options = asdict(settings) | {"overwrite": a.overwrite, "progress": not a.quiet}
    run = ql.finetune(model, tokenizer, train, out=a.out, **options)
    after = ql.held_out(model, tokenizer, test) if test else None
    if not a.json and test:
        _show_answers(test, before.answers, after.answers)
    _report(a, _summary(run, before, after))


def open_lab(a: argparse.Namespace) -> None:
    """Replace this process by JupyterLab on the first notebook; its token stays on."""
    notebook = Path(a.notebook)
    if not notebook.is_file():
        raise FileNotFoundError(f"{notebook} is not here: run this where the course is, or name a notebook")
    command = [sys.executable, "-m", "jupyterlab", str(notebook), "--LabApp.news_url=None"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    os.execv(sys.executable, command)


# ------------------------------------------------------------------------------------------------------------- helpers


def _load(a: argparse.Namespace):
    codebook = None if a.codebook == "none" else a.codebook
    dtype = None
    if a.dtype != "auto":
        import torch

        dtype = getattr(torch, a.dtype)
    return ql.load(a.model, codebook, a.block_size, not a.no_double_quant, dtype=dtype, progress=not a.quiet)


def _held_out_examples(a: argparse.Namespace) -> list:
    if not a.held_out:
        return []
    if a.test_data:
        return ql.load_data(a.test_data)[: a.held_out]
    return ql.load_data(a.data, "test")[: a.held_out] if a.data == "docstrings" else []


def _show_answers(examples: list, before: list[str], after: list[str]) -> None:
    for example, first, last in list(zip(examples, before, after, strict=True))[:PREVIEW]:
        print(f"\nwritten by a person  {example.answer}\nmodel, before        {_one_line(first)}")
        print(f"model, after         {_one_line(last)}")
    print()


def _summary(run, before, after) -> dict:
    figures = {
        "adapter": str(run.adapter),
        "steps": run.settings.steps,
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.seconds,
        "examples_used": run.data.kept,
        "examples_too_long": run.data.too_long,
    }
    for name, result in (("before", before), ("after", after)):
        if result:
            figures |= {f"held_out_loss_{name}": result.loss, f"rouge_l_{name}": result.rouge_l}
    return figures


def _report(a: argparse.Namespace, figures: dict) -> None:
    if a.json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


# -------------------------------------------------------------------------------------------------------------- parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-lab",
        description="See how QLoRA works, then use it. Each command has its own --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"qlora-lab {ql.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = _command(commands, "fetch", fetch, "put a model on this machine", "qlora-lab fetch smollm2-135m")
    c.add_argument("model", help="a known name, such as smollm2-135m")
    _common(c)

    c = _command(
        commands,
        "finetune",
        finetune,
        "train a LoRA adapter on a quantised model",
        "qlora-lab finetune --model smollm2-135m --data docstrings --steps 60 --out runs/first",
    )
    _model_options(c)
    c.add_argument("--data", default="docstrings", help="docstrings, or a JSONL file: Alpaca, ShareGPT or messages")
    c.add_argument("--test-data", metavar="FILE", help="held-out examples, where --data is a file")
    c.add_argument(
        "--held-out", type=int, default=50, metavar="N", help="examples to test on, 0 for none (%(default)s)"
    )
    c.add_argument("--out", default="runs/first", help="folder for adapter, log and settings (%(default)s)")
    c.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    c.add_argument("--steps", type=int, default=60, help="(%(default)s)")
    c.add_argument("--batch-size", type=int, default=8, help="examples a step (%(default)s)")
    c.add_argument("--lr", type=float, default=2e-4, help="learning rate of AdamW (%(default)s)")
    c.add_argument("--clip", type=float, default=0.3, help="largest gradient norm (%(default)s)")
    c.add_argument("--max-length", type=int, default=256, help="tokens; longer examples are left out (%(default)s)")
    c.add_argument("--r", type=int, default=16, help="rank of the adapters (%(default)s)")
    c.add_argument("--alpha", type=float, default=16, help="strength: the adapter is scaled by alpha / r (%(default)s)")
    c.add_argument("--dropout", type=float, default=0.0, help="on the adapter's input (%(default)s)")
    c.add_argument("--targets", nargs="+", default=["all-linear"], help="all-linear, or layer names such as q_proj")
    c.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    _common(c)

    c = _command(
        commands,
        "generate",
        generate,
        "ask a model, with or without an adapter",
        'qlora-lab generate "What is the capital of France?" --adapter runs/first/adapter',
    )
    c.add_argument("question")
    _model_options(c)
    c.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format")
    c.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    _common(c)

    c = _command(commands, "open", open_lab, "open the course in JupyterLab", "qlora-lab open")
    c.add_argument("notebook", nargs="?", default="notebooks/00_start_here.ipynb", help="(%(default)s)")
    return parser


def _command(commands, name, run, summary, example) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    parser.set_defaults(run=run)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="smollm2-135m", help="a known name, a local folder, or a hub id org/name (%(default)s)"
    )
    parser.add_argument(
        "--codebook", default="nf4", help="type of the weights: nf4, fp4, int4, ..., none (%(default)s)"
    )
    parser.add_argument("--block-size", type=int, default=64, help="weights that share a constant (%(default)s)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="what to compute in; auto: what is fastest here"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="leave the constants in float32")
