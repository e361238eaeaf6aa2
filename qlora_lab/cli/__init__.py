"""The command line: parses, calls the library, prints. `qlora-lab COMMAND --help` shows an example of each.

Exit codes: 0 done; 1 the doctor found a problem, verify a difference, or memory that a run does not fit; 2 a mistake in
what was asked, or a disk or memory that is full, told in one line; 130 interrupted: by Ctrl-C, SIGTERM, or a terminal
that was closed (SIGHUP).
What cannot be printed changes no exit code, unless it is the result that was asked for: then it is 2.
"""

import argparse
import errno
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import qlora_lab as ql
from qlora_lab.cli.options import Parser, levels, number, one_line as _one_line, size, whole

if TYPE_CHECKING:
    from qlora_lab.cli.streams import Patient
    from qlora_lab.model.share import Share
    from qlora_lab.quant.plan import Candidate
    from qlora_lab.train.settings import Settings

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MISTAKES = (ValueError, FloatingPointError, OSError)  # what the library raises on purpose, and ModelError
PRINTING = ("generate", "doctor", "memory", "kernels", "verify")  # what they print is all that they do
LESS_MEMORY = {  # what would help, by command
    "finetune": "use --micro-batch-size 1, --gradient-checkpointing or a lower --max-length",
    "generate": "use fewer --max-new-tokens, or the copy that `qlora-lab quantize` makes as --model",
    "doctor": "use a lower --batch-size or --max-length",
    "sweep": "use a lower --length; the rows that are in --out are kept",
    "block-size": "use a lower --length, or fewer --windows",
    "quantize": "close other programs, then repeat it: it goes on where it stopped",
}
PREVIEW = 3  # answers shown before and after training
EXITS = """Exit codes: 0 done; 1 doctor found a problem, verify a difference, or memory that a run does not fit; 2 a
mistake, or a full disk or memory, told in one line; 130 interrupted. Ctrl-C, SIGTERM and a terminal that is closed end
a command alike: finetune saves after the step that it makes; finetune --resume, quantize and sweep go on from there.
Under nohup a closed terminal ends nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from qlora_lab.cli.streams import patient_streams
    from qlora_lab.train.interrupt import ending_like_ctrl_c

    with patient_streams() as stdout:
        try:
            arguments = build_parser().parse_args(argv)
        except SystemExit:  # after --help as well
            if _unprinted(stdout, "qlora-lab"):
                raise SystemExit(2) from None
            raise
        with ending_like_ctrl_c():
            code = _run(arguments)
        asked = arguments.json if "json" in arguments else False
        if code < 2 and (asked or arguments.command in PRINTING):
            return 2 if _unprinted(stdout, f"qlora-lab {arguments.command}") else code
        return code


def _run(arguments: argparse.Namespace) -> int:
    process = int(os.environ.get("RANK", 0))  # set by torchrun
    if process > 0:
        arguments.quiet = True  # the first process shows progress, and it alone prints
    try:
        with _warnings_as_lines(arguments.command, silent=process > 0):
            return arguments.run(arguments) or 0
    except KeyboardInterrupt as interrupt:  # one from training says what is saved, and how to go on
        if process == 0:
            print(f"qlora-lab {arguments.command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        said = _said(error, arguments.command)
        if said is None:
            raise
        which = f" (process {process})" if process else ""
        print(f"qlora-lab {arguments.command}{which}: {_one_line(said)}", file=sys.stderr)
        return 2


def _unprinted(stdout: "Patient", command: str) -> bool:
    """Whether something could not be printed, which is then said on stderr."""
    stdout.flush()
    if stdout.error:
        reason = getattr(stdout.error, "strerror", None) or stdout.error
        print(f"{command}: the result could not be printed ({reason})", file=sys.stderr)
    return stdout.error is not None


@contextmanager
def _warnings_as_lines(command: str, silent: bool) -> Iterator[None]:
    """Print each warning to stderr as one line, without the source line that raised it; silent: print none."""

    def show(message, *_) -> None:
        if not silent:
            print(f"qlora-lab {command}: {_one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():  # undone at the end
        warnings.showwarning = show
        yield


def _said(error: Exception, command: str) -> str | None:
    """What a mistake, a full disk or full memory is told as; None for a bug."""
    from qlora_lab.model.fetch import ModelError
    from qlora_lab.model.out_of_memory import OutOfMemory, is_out_of_memory

    if is_out_of_memory(error):
        advice = LESS_MEMORY.get(command, "close other programs, or choose a smaller model")
        return str(error) if isinstance(error, OutOfMemory) else f"out of memory: {advice}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        room = ": free space there, then repeat it" if error.errno in NO_ROOM else ""
        return f"{error.strerror}: {str(error.filename)!r}{room}"
    return str(error) if isinstance(error, (*MISTAKES, ModelError)) else None


# ------------------------------------------------------------------------------------------------------------ commands


def fetch(a: argparse.Namespace) -> None:
    from qlora_lab.files.strict_json import read_json

    folder = ql.fetch(a.model, progress=not a.quiet)
    source = folder / "source.json"
    _report(a, {"model": a.model, "folder": str(folder)} | (read_json(source) if source.exists() else {}))


def quantize(a: argparse.Namespace) -> None:
    from qlora_lab.model.quantized_folder import folder_in_4_bits

    options = a.codebook, a.block_size, not a.no_double_quant
    folder = ql.quantize_folder(a.model, a.out, *options, plan=a.plan, progress=not a.quiet)
    _tell(a, folder_in_4_bits(folder))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _report(a, {"model": a.model, "folder": str(folder), "bytes_of_weights": size})


def generate(a: argparse.Namespace) -> None:
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.train.run_folder import find_adapter

    check_whole("max-new-tokens", a.max_new_tokens)
    if a.adapter:
        find_adapter(Path(a.adapter))
    model, tokenizer = _load(a)
    if a.adapter is not None:  # "" is a mistake, such as a shell's variable that is not set
        ql.load_adapter(model, a.adapter)
    answer = ql.generate(model, tokenizer, a.question, a.max_new_tokens, progress=not a.quiet)
    print(json.dumps({"question": a.question, "answer": answer}) if a.json else answer)


def finetune(a: argparse.Namespace) -> None:
    from qlora_lab.adapters.lora import check_rank, check_strength
    from qlora_lab.quant.blocks import check_block_size
    from qlora_lab.quant.codebook import codebook
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.train.run_folder import reserved_run
    from qlora_lab.train.settings import Settings

    # before the model is loaded: a mistyped word should not cost a minute
    settings = Settings(**{field.name: getattr(a, field.name) for field in fields(Settings)})
    check_strength(a.alpha, a.dropout)
    if a.codebook != "none":
        codebook(a.codebook)
    check_block_size(a.block_size)
    check_rank(a.r)
    check_whole("held-out", a.held_out, 0)
    if type(a.resume) is int:
        check_whole("resume", a.resume)
    first = int(os.environ.get("RANK", 0)) == 0
    with reserved_run(a.out, a.overwrite, a.resume) if first else nullcontext():
        _finetune(a, settings)


def _finetune(a: argparse.Namespace, settings: "Settings") -> None:
    from qlora_lab.model.fetch import resolve
    from qlora_lab.train.distributed import check_shard, first_on_node, processes
    from qlora_lab.train.settings import check_held_out

    train = ql.load_data(a.data, progress=not a.quiet)
    test = _held_out_examples(a)
    check_held_out(settings, test)
    targets = a.targets[0] if len(a.targets) == 1 else a.targets  # "all-linear" is one word
    with processes() as rank:
        check_shard(a.shard)
        first_on_node(lambda: resolve(a.model, progress=not a.quiet))
        model, tokenizer = _load(a)
        ql.add_lora(model, a.r, a.alpha, a.dropout, targets, seed=a.seed)
        if rank == 0 and not (a.json or a.quiet):
            from qlora_lab.doctor.dtype_policy import dtype_policy

            print(f"{dtype_policy(model, a.optimizer_bits)}\n")
        before = ql.held_out(model, tokenizer, test, progress=not a.quiet) if test and rank == 0 else None
        options = {"held_out": test, "resume": a.resume, "overwrite": a.overwrite, "progress": not a.quiet}
        options["other_arithmetic"] = a.other_arithmetic
        run = ql.finetune(model, tokenizer, train, out=a.out, **options, **asdict(settings))
        after = ql.held_out(model, tokenizer, test, progress=not a.quiet) if test and rank == 0 else None
        if rank == 0:  # the only one that tests and prints
            if not a.json and test:
                _show_answers(test, before.answers, after.answers)
            _report(a, _summary(run, before, after))


def doctor(a: argparse.Namespace) -> int:
    """Returns 1 if there is a problem."""
    from qlora_lab.adapters.lora import check_rank
    from qlora_lab.doctor.diagnose import diagnose
    from qlora_lab.train.settings import Settings

    check_rank(a.r)
    options = {name: getattr(a, name) for name in ("max_length", "batch_size", "optimizer_bits", "packing", "seed")}
    Settings(**options)  # before the model is loaded, as for finetune
    data = ql.load_data(a.data, progress=not a.quiet)
    model, tokenizer = _load(a)
    ql.add_lora(model, a.r, targets=a.targets[0] if len(a.targets) == 1 else a.targets, seed=a.seed)
    report = diagnose(model, tokenizer, data, **options, progress=not a.quiet)
    print(json.dumps(report.to_dict()) if a.json else f"{report}\n\n{report.dtypes}")
    return 0 if report.ok else 1


def memory(a: argparse.Namespace) -> int:
    """Returns 1 if it does not fit on the card, whatever is switched on."""
    names = "codebook block_size dtype adapter_dtype r batch_size micro_batch_size mean_length packing learned"
    names += " gradient_checkpointing optimizer_bits optimizer_budget device"
    setup = {name: getattr(a, name) for name in names.split()}
    setup |= {"length": a.max_length, "double_quant": not a.no_double_quant}
    setup["targets"] = a.targets[0] if len(a.targets) == 1 else a.targets
    found = (
        ql.predict_memory(a.model, a.method, **setup) if a.gpu is None else ql.fit(a.model, a.gpu, a.method, **setup)
    )
    print(json.dumps(found.to_dict()) if a.json else found)
    return 0 if a.gpu is None or found.fits else 1


def sweep(a: argparse.Namespace) -> None:
    from qlora_lab.measure.sweep import sweep as run, variants

    double_quant = {"off": [False], "on": [True], "both": [False, True]}[a.double_quant]
    tables = dict(a.levels)
    if len(tables) < len(a.levels):
        raise ValueError("--levels: two tables have one name: rename one of them")
    grid = variants(dict.fromkeys([*a.codebooks, *tables]), a.block_sizes, double_quant)
    settings = [one._replace(levels=tables.get(one.codebook)) for one in grid]
    options = {"windows": a.windows, "length": a.length, "seed": a.seed, "progress": not a.quiet}
    if a.text is not None:
        options["text"] = _text(a.text)
    rows = run(a.model, settings, a.out, **options)
    if a.json:
        print(json.dumps(rows))
        return
    whole = rows[0]["perplexity"]  # of the model as it is
    print(_table([_swept(row, whole) for row in sorted(rows, key=lambda row: row["perplexity"])]))


def block_size(a: argparse.Namespace) -> None:
    from qlora_lab.files.lock import locked_file, reserved
    from qlora_lab.files.out_path import resolved
    from qlora_lab.measure.best_plan import check_limits
    from qlora_lab.measure.perplexity import check_windows
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.quant.plan import Candidate, check_candidate, check_plan_path

    candidates = tuple(Candidate(name, size, a.double_quant) for name in a.codebooks for size in a.block_sizes)
    for one in candidates:  # before the model is loaded, as for finetune
        check_candidate(one)
    check_limits(a.bits, a.constants_share)
    check_whole("share-below", a.share_below, 0)
    check_windows(a.length, a.windows)
    out = check_plan_path(a.out)
    parent = resolved(out).parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FileNotFoundError(f"{parent} is no folder that the plan can be written to: make one, or name another")
    with locked_file(out, "block-size") as lock, reserved(lock):
        _block_size(a, candidates, out)


def _block_size(a: argparse.Namespace, candidates: tuple["Candidate", ...], out: Path) -> None:
    import torch

    from qlora_lab.measure.best_plan import Choices, best_plan, bits_table, small_layers
    from qlora_lab.measure.perplexity import topics_text
    from qlora_lab.measure.sensitivity import choices_of, sensitivity
    from qlora_lab.model.load import layer_sizes

    topics = topics_text()
    text = topics[len(topics) // 2 :] if a.text is None else _text(a.text)  # perplexities are those of its first half
    model, tokenizer = ql.load(a.model, codebook=None, dtype=torch.float32, progress=not a.quiet)

    def best(choices: Choices):
        groups = small_layers(choices, a.share_below)
        return best_plan(choices, a.bits, constants_share=a.constants_share, groups=groups)

    names, numel = zip(*layer_sizes(model).items(), strict=True)
    bits = bits_table(numel, candidates)
    best(Choices(names, numel, candidates, error=bits, bits=bits))  # limits that are too small: not after minutes
    s = sensitivity(model, tokenizer, text, windows=a.windows, length=a.length, fisher=True, progress=not a.quiet)
    del model
    plan = best(choices_of(a.model, candidates, s, progress=not a.quiet))
    figures = {"plan": str(plan.save(out)), "bits_per_parameter": plan.bits_per_parameter}
    counts = Counter(plan.chosen.values())
    layers = {f"layers_{one.codebook}_{one.block_size}": counts[one] for one in candidates if counts[one]}
    _report(a, figures | {"expected_increase_of_loss": plan.error} | layers)


def kernels(a: argparse.Namespace) -> None:
    from qlora_lab.gpu_code import aot

    archs = list(dict.fromkeys(a.arch or [90]))
    if a.sass is not None or a.ptx is not None:
        if a.rungs or a.json or a.compare:
            raise ValueError("--sass and --ptx print the code of the one rung that they name: leave out all else")
        code, name = (aot.sass, a.sass) if a.sass is not None else (aot.ptx, a.ptx)
        print("\n".join(code(name, arch, a.dtype) for arch in archs))
        return
    aot.check_product(a.shape, a.tokens)
    ours = aot.report(a.rungs or None, archs, a.dtype, progress=not a.quiet)
    theirs, notes = [], []
    for arch in archs if a.compare else []:
        found, note = aot.bitsandbytes_report(arch, a.dtype)
        theirs += found or []
        notes.append(note)
    rows = []  # each of ours, and theirs that do the same work
    for one in ours:
        peers = [peer for peer in theirs if (peer.rung, peer.arch) == (one.rung, one.arch)]
        rows += [(one.rung, one), *((f"  {peer.kernel.split('<')[0]}", peer) for peer in peers)]
    roofs = [aot.roofline(one, tuple(a.shape), a.tokens) for _, one in rows]
    if a.json:
        cards = [[asdict(roof) | {"seconds": roof.seconds, "bound": roof.bound} for roof in found] for found in roofs]
        records = [asdict(one) | {"roofline": found} for (_, one), found in zip(rows, cards, strict=True)]
        print(json.dumps({"kernels": records, "notes": notes}))
        return
    print(f"Instructions for each weight ({a.dtype}): what a thread executes in a full tile, counted in machine code")
    print(_table([_mix(*row) for row in rows]))
    print("\nResources; bytes for each weight, asked for and the least; bits of global loads and stores")
    print(_table([_resources(*row) for row in rows]))
    product = f"{a.shape[0]} x {a.shape[1]} weights and {a.tokens} tokens"
    print(f"\nLeast microseconds by data sheet, and what is waited for: a model, no measurement; {product}")
    print(_table([_roofs(name, one, found) for (name, one), found in zip(rows, roofs, strict=True)]))
    if notes:
        print("", *(f"Indented: {note}." if theirs else f"{note}." for note in notes), sep="\n")


def verify(a: argparse.Namespace) -> int:
    """Returns 1 if something differs from what was written, or is missing."""
    from qlora_lab.measure.results_file import verify_rows
    from qlora_lab.train.verify import verify as check

    parts = verify_rows(a.folder) if Path(a.folder).is_file() else check(a.folder, progress=not a.quiet)
    if a.json:
        print(json.dumps([asdict(part) for part in parts]))
    else:
        width = max(len(part.name) for part in parts)
        for part in parts:
            files = [name.removeprefix(part.name) for name in part.files if name != part.name]
            print(f"{part.name:<{width}}  {part.state}{': ' * bool(any(files))}{', '.join(filter(None, files))}")
    return 0 if all(part.is_well for part in parts) else 1


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
    loaded = ql.load(a.model, codebook, a.block_size, not a.no_double_quant, dtype=dtype, progress=not a.quiet)
    if codebook:
        from qlora_lab.model.share import in_4_bits

        _tell(a, in_4_bits(loaded[0]))
    return loaded


def _tell(a: argparse.Namespace, share: "Share") -> None:
    """Print the share in 4 bits to stderr, where progress goes; stdout holds results."""
    if share.is_enough and not (a.json or a.quiet) and int(os.environ.get("RANK", 0)) == 0:
        print(share, file=sys.stderr)  # else load has warned


def _held_out_examples(a: argparse.Namespace) -> list:
    if not a.held_out:
        return []
    if a.test_data is not None:
        return ql.load_data(a.test_data)[: a.held_out]
    return ql.load_data(a.data, "test", progress=not a.quiet)[: a.held_out] if a.data == "docstrings" else []


def _show_answers(examples: list, before: list[str], after: list[str]) -> None:
    for example, first, last in list(zip(examples, before, after, strict=True))[:PREVIEW]:
        print(f"\nwritten by a person  {example.answer}\nmodel, before        {_one_line(first)}")
        print(f"model, after         {_one_line(last)}")
    print()


def _summary(run, before, after) -> dict:
    figures = {
        "adapter": str(run.adapter),
        "ended": run.ended,
        "steps": len(run.losses),
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.seconds,
        "examples_used": run.data.kept,
        "examples_too_long": run.data.too_long,
    }
    if run.held_out:
        step, loss = min(run.held_out, key=lambda one: one[1])
        figures |= {"best_adapter": str(run.best), "best_step": step, "best_held_out_loss": loss}
    for name, result in (("before", before), ("after", after)):
        if result:
            figures |= {f"held_out_loss_{name}": result.loss, f"rouge_l_{name}": result.rouge_l}
    return figures


def _swept(row: dict, whole: float) -> dict[str, str]:
    quantised = row["codebook"] is not None
    return {
        "codebook": row["codebook"] or "none",
        "block size": str(row["block_size"]) if quantised else "",
        "double quant": ("yes" if row["double_quant"] else "no") if quantised else "",
        "bits": f"{row['bits_per_parameter']:.3f}",
        "perplexity": f"{row['perplexity']:.3f}",
        "more": f"{row['perplexity'] / whole - 1:.1%}" if quantised else "",
        "squared error": f"{row['relative_error']:.5f}" if quantised else "",
        "entropy": f"{row['entropy']:.3f}" if quantised else "",
    }


def _text(name: str) -> str:
    from qlora_lab.files.strict_json import check_regular

    check_regular(Path(name))
    try:
        return Path(name).read_text(encoding="utf-8-sig")  # a mark that an editor put at its start is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _mix(name: str, one) -> dict[str, str]:
    from qlora_lab.gpu_code.machine_code import KINDS

    names = "tensor", "load", "store", "shared", "local", "convert", "float", "integer", "other"
    counts = {name: f"{one.mix[kind]:.2f}" for name, kind in zip(names, KINDS, strict=True)}
    return {"rung": name, "sm": str(one.arch), **counts, "sum": f"{one.per_weight:.2f}"}


def _resources(name: str, one) -> dict[str, str]:
    from qlora_lab.gpu_code.machine_code import widths

    return {
        "rung": name,
        "sm": str(one.arch),
        "registers": str(one.registers),
        "shared bytes": str(one.shared),
        "spills": str(one.spills),
        "occupancy": f"{one.occupancy:.0%}",
        "bytes": f"{one.moved:.2f} / {one.least:.2f}",
        "bits": " / ".join(" ".join(map(str, side)) for side in widths(one.accesses)),
    }


def _roofs(name: str, one, roofs: list) -> dict[str, str]:
    """A card that has no unit for the dtype says so."""
    times = [f"{r.card} {r.seconds * 1e6:.3g} {r.bound}" if r.seconds else f"{r.card} no {one.dtype}" for r in roofs]
    return {"rung": name, "sm": str(one.arch), "cards": ", ".join(times)}


def _table(rows: list[dict[str, str]]) -> str:
    """Columns as wide as their widest entry; numbers to the right, the first and the last column to the left."""
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    first, *_, last = wide
    lines = [{name: name for name in wide}, *rows]
    return "\n".join(
        "  ".join(f"{row[name]:{'<' if name in (first, last) else '>'}{wide[name]}}" for name in wide).rstrip()
        for row in lines
    )


def _report(a: argparse.Namespace, figures: dict) -> None:
    if a.json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


# -------------------------------------------------------------------------------------------------------------- parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qlora-lab",
        description="See how QLoRA works, then use it. Each command has its own --help with an example.",
        epilog=EXITS,
    )
    parser.add_argument("--version", action="version", version=f"qlora-lab {ql.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = _command(commands, "fetch", fetch, "put a model on this machine", "qlora-lab fetch smollm2-135m")
    c.add_argument("model", help="a known name, such as smollm2-135m")
    _common(c)

    c = _command(
        commands,
        "quantize",
        quantize,
        "write a copy of a model in 4 bits, which loads in seconds; repeated after an interrupt it goes on",
        "qlora-lab quantize smollm2-135m --out smollm2-nf4",
    )
    c.add_argument("model", help="a known name, a local folder, or a hub id org/name")
    c.add_argument("--out", required=True, help="folder for the copy, which --model then takes")
    c.add_argument("--plan", metavar="FILE", help="of block-size: data type and block size for each layer")
    _quantisation_options(c)
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
        "--held-out", type=whole, default=50, metavar="N", help="examples to test on, 0 for none (%(default)s)"
    )
    c.add_argument("--out", default="runs/first", help="folder for adapter, log and settings (%(default)s)")
    c.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier run in --out; it is kept until the new one has an adapter",
    )
    c.add_argument(
        "--resume",
        nargs="?",
        type=whole,
        const=True,
        default=False,
        metavar="STEP",
        help="go on with the run in --out, from its newest checkpoint or that of STEP; begin where there is none",
    )
    c.add_argument(
        "--other-arithmetic", action="store_true", help="resume also with other versions or another processor"
    )
    c.add_argument("--steps", type=whole, default=60, help="(%(default)s)")
    c.add_argument("--batch-size", type=whole, default=8, help="examples a step (%(default)s)")
    c.add_argument("--lr", type=number, default=2e-4, help="learning rate of AdamW (%(default)s)")
    c.add_argument("--schedule", default="constant", help="of the learning rate: constant or cosine (%(default)s)")
    c.add_argument("--warmup-steps", type=whole, default=0, help="in which the rate rises (%(default)s)")
    c.add_argument("--clip", type=number, default=0.3, help="largest gradient norm (%(default)s)")
    c.add_argument("--max-length", type=whole, default=256, help="tokens; longer examples are left out (%(default)s)")
    c.add_argument("--packing", action="store_true", help="several examples in a row of --max-length tokens")
    c.add_argument("--group-by-length", action="store_true", help="batches of examples that are alike in length")
    c.add_argument("--eval-every", type=whole, default=0, metavar="N", help="steps between evaluations, 0 for none")
    c.add_argument(
        "--patience", type=whole, default=0, metavar="N", help="evaluations without a new best, then it stops"
    )
    c.add_argument("--save-every", type=whole, default=50, metavar="N", help="steps between checkpoints (%(default)s)")
    c.add_argument("--keep", type=whole, default=2, metavar="K", help="checkpoints that are kept (%(default)s)")
    c.add_argument("--micro-batch-size", type=whole, metavar="N", help="rows at once, for less memory; default: all")
    c.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again, for less memory")
    c.add_argument(
        "--shard", action="store_true", help="under torchrun: spread the base over all processes, for less memory"
    )
    c.add_argument("--optimizer-bits", type=whole, default=32, help="of AdamW's moments: 32 or 8 (%(default)s)")
    c.add_argument(
        "--optimizer-budget",
        type=size,
        metavar="BYTES",
        help="of AdamW's state in memory, such as 64MiB; the rest is paged. Default: all of it",
    )
    c.add_argument("--r", type=whole, default=16, help="rank of the adapters (%(default)s)")
    c.add_argument(
        "--alpha", type=number, default=16, help="strength: the adapter is scaled by alpha / r (%(default)s)"
    )
    c.add_argument("--dropout", type=number, default=0.0, help="on the adapter's input (%(default)s)")
    c.add_argument("--targets", nargs="+", default=["all-linear"], help="all-linear, or layer names such as q_proj")
    c.add_argument("--seed", type=whole, default=0, help="(%(default)s)")
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
    c.add_argument("--max-new-tokens", type=whole, default=128, help="(%(default)s)")
    _common(c)

    c = _command(
        commands,
        "doctor",
        doctor,
        "look for what goes wrong silently, before a run",
        "qlora-lab doctor --model smollm2-135m --data docstrings",
    )
    _model_options(c)
    c.add_argument("--data", default="docstrings", help="docstrings, or a JSONL file: Alpaca, ShareGPT or messages")
    c.add_argument("--batch-size", type=whole, default=8, help="rows at once in the planned run (%(default)s)")
    c.add_argument("--max-length", type=whole, default=256, help="tokens; longer examples are left out (%(default)s)")
    c.add_argument("--packing", action="store_true", help="the planned run packs several examples into a row")
    c.add_argument("--optimizer-bits", type=whole, default=32, help="of AdamW's moments: 32 or 8 (%(default)s)")
    c.add_argument("--r", type=whole, default=16, help="rank of the adapters (%(default)s)")
    c.add_argument("--targets", nargs="+", default=["all-linear"], help="all-linear, or layer names such as q_proj")
    c.add_argument("--seed", type=whole, default=0, help="of the sample and the adapters (%(default)s)")
    _common(c)

    c = _command(
        commands,
        "kernels",
        kernels,
        "what the GPU kernels are compiled to, without a GPU",
        "qlora-lab kernels dequantize_nf4 --arch 80 --arch 90 --compare",
    )
    c.add_argument("rungs", nargs="*", metavar="RUNG", help="such as dequantize_nf4; none: all that take the dtype")
    c.add_argument("--arch", type=whole, action="append", metavar="SM", help="80, 90 or 100; may be repeated (90)")
    c.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (%(default)s)")
    c.add_argument("--compare", action="store_true", help="show kernels of bitsandbytes that do the same work")
    c.add_argument("--sass", metavar="RUNG", help="print its machine code instead")
    c.add_argument("--ptx", metavar="RUNG", help="print its PTX instead")
    c.add_argument(
        "--shape",
        nargs=2,
        type=whole,
        default=(4096, 4096),
        metavar=("ROWS", "COLUMNS"),
        help="of a weight (4096 4096)",
    )
    c.add_argument("--tokens", type=whole, default=256, metavar="N", help="of a product (%(default)s)")
    _common(c)

    c = _command(
        commands,
        "memory",
        memory,
        "where every byte of a training step goes, and what fits on a card; no weights are needed",
        "qlora-lab memory llama-7b --gpu 24 --r 64 --max-length 1024",
    )
    c.add_argument("model", help="a known name, llama-7b to llama-2-70b, a folder, or a config.json")
    c.add_argument(
        "--gpu", type=number, metavar="GB", help="memory of the card: advise settings for it, and its limits"
    )
    c.add_argument("--method", default="qlora", help="qlora, lora or full (%(default)s)")
    c.add_argument("--codebook", default="nf4", help="type of the weights (%(default)s)")
    c.add_argument("--block-size", type=whole, default=64, help="weights that share a constant (%(default)s)")
    c.add_argument("--no-double-quant", action="store_true", help="leave the constants in float32")
    c.add_argument("--dtype", default="bfloat16", help="of what is not quantised (%(default)s)")
    c.add_argument("--adapter-dtype", default="float32", help="float32 as here and in PEFT, bfloat16 as in TRL")
    c.add_argument("--r", type=whole, default=16, help="rank of the adapters (%(default)s)")
    c.add_argument("--targets", nargs="+", default=["all-linear"], help="all-linear, or layer names such as q_proj")
    c.add_argument("--batch-size", type=whole, default=8, help="examples a step (%(default)s)")
    c.add_argument("--micro-batch-size", type=whole, metavar="N", help="rows at once; default: all")
    c.add_argument("--max-length", type=whole, default=256, help="tokens of a row (%(default)s)")
    c.add_argument("--mean-length", type=whole, metavar="N", help="tokens of an example, for --packing")
    c.add_argument("--packing", action="store_true", help="several examples in a row")
    c.add_argument("--learned", type=number, default=0.25, help="share of tokens that are labels (%(default)s)")
    c.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again")
    c.add_argument("--optimizer-bits", type=whole, default=32, help="of AdamW's moments: 32 or 8 (%(default)s)")
    c.add_argument("--optimizer-budget", type=size, metavar="BYTES", help="of AdamW's state in memory, such as 64MiB")
    c.add_argument("--device", default="cuda", help="cuda, or cpu (%(default)s)")
    _common(c)

    c = _command(
        commands,
        "sweep",
        sweep,
        "perplexity by data type, block size and double quantization; repeated after an interrupt it goes on",
        "qlora-lab sweep smollm2-135m --codebooks nf4 fp4 --block-sizes 64 128 --double-quant both --out rows.jsonl",
    )
    c.add_argument("model", help="a known name, a local folder, or a hub id org/name")
    c.add_argument(
        "--codebooks",
        nargs="+",
        default=["nf4", "fp4", "int4"],
        metavar="NAME",
        help="nf4, fp4, int4, ..., or lloyd-max, fitted to the model (nf4 fp4 int4)",
    )
    c.add_argument(
        "--levels",
        action="append",
        type=levels,
        default=[],
        metavar="NAME=V1,V2,...",
        help="a codebook of your own, from -1 to 1: mine=-1,-0.4,-0.1,0,0.1,0.3,0.6,1; may be repeated",
    )
    c.add_argument("--block-sizes", nargs="+", type=whole, default=[64], metavar="N", help="16 to 4096 (64)")
    c.add_argument("--double-quant", default="off", choices=("off", "on", "both"), help="of constants (%(default)s)")
    c.add_argument("--out", required=True, metavar="FILE", help="results, one line of JSON each; rows in it are kept")
    c.add_argument("--text", metavar="FILE", help="UTF-8 text to predict; default: Python's help topics")
    c.add_argument("--windows", type=whole, default=8, help="pieces of text to predict (%(default)s)")
    c.add_argument("--length", type=whole, default=512, help="tokens of each (%(default)s)")
    c.add_argument("--seed", type=whole, default=0, help="of the weights that lloyd-max is fitted to (%(default)s)")
    _common(c)

    c = _command(
        commands,
        "block-size",
        block_size,
        "a plan for quantize: the mix of data types and block sizes that should cost the least loss for its bits",
        "qlora-lab block-size smollm2-135m --bits 4.5 --out plan.json",
    )
    c.add_argument("model", help="a known name, a local folder, or a hub id org/name")
    c.add_argument("--bits", type=number, required=True, help="bits per parameter at most, constants included")
    c.add_argument("--out", required=True, metavar="FILE", help="for the plan")
    c.add_argument("--codebooks", nargs="+", default=["nf4"], metavar="NAME", help="to choose from (nf4)")
    sizes = [32, 64, 128, 256, 512, 1024]
    c.add_argument(
        "--block-sizes", nargs="+", type=whole, default=sizes, metavar="N", help="to choose from (32 to 1024)"
    )
    c.add_argument("--double-quant", action="store_true", help="quantise the constants, too")
    c.add_argument("--constants-share", type=number, metavar="S", help="constants take at most this of the codes: 0.05")
    c.add_argument(
        "--share-below", type=whole, default=0, metavar="N", help="layers of fewer weights in a module choose as one"
    )
    c.add_argument("--text", metavar="FILE", help="to calibrate on; default: half of Python's help topics")
    c.add_argument("--windows", type=whole, default=12, help="pieces of text to calibrate on (%(default)s)")
    c.add_argument("--length", type=whole, default=256, help="tokens of each (%(default)s)")
    _common(c)

    c = _command(
        commands,
        "verify",
        verify,
        "whether a run, an adapter, a quantised copy, a fetched model or a sweep's results are as they were written",
        "qlora-lab verify runs/first",
    )
    c.add_argument(
        "folder", help="a folder that a command of qlora-lab made, or a sweep's results. Exit code 1: something differs"
    )
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


def _quantisation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codebook", default="nf4", help="type of the weights: nf4, fp4, int4, ...; none: as they are (%(default)s)"
    )
    parser.add_argument("--block-size", type=whole, default=64, help="weights that share a constant (%(default)s)")
    parser.add_argument("--no-double-quant", action="store_true", help="leave the constants in float32")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="smollm2-135m", help="a known name, a local folder, or a hub id org/name (%(default)s)"
    )
    _quantisation_options(parser)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="what to compute in; auto: what is fastest here"
    )


if __name__ == "__main__":
    sys.exit(main())
