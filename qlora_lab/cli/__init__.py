"""The command line: parses, calls the library, prints. `qlora-lab COMMAND --help` shows an example of each command.

In: the words after `qlora-lab`. Out: an exit code (EXITS). One file per command holds its options and its work; here is
what all share: which commands there are, how a command ends, and how an error is reported.
Output that cannot be printed changes no exit code unless it is the requested result: then the code is 2.
"""

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import qlora_lab as ql
from qlora_lab.cli.options import Parser, one_line
from qlora_lab.cli.streams import Patient, patient_streams
from qlora_lab.train.interrupt import ending_like_ctrl_c
from qlora_lab.train.torchrun import rank

# Each is a file of this folder.
COMMANDS = ("fetch", "quantize", "finetune", "generate", "chat", "doctor", "kernels")
COMMANDS += ("merge", "gguf", "memory", "sweep", "multiple-choice", "tournament", "block-size", "xray", "conformance")
COMMANDS += ("experts", "verify", "open", "grade")
LESS_MEMORY = "close other programs, or choose a smaller model"  # a command may know something better
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MISTAKES = (ValueError, FloatingPointError, OSError)  # what the library raises on purpose, beside ModelError
# Commands whose only effect is what they print.
PRINTING = ("generate", "chat", "doctor", "memory", "kernels", "xray", "conformance", "experts", "verify")
EXITS = """Exit codes: 0 done; 1 doctor found a problem, verify or xray found a difference, conformance found one
without a known reason, or memory found that a run does not fit; 2 a mistake, a full disk or too little memory, reported
in one line, or faults that xray lists; 130 interrupted. Ctrl-C, SIGTERM and a closed terminal all end a command in the
same way: finetune finishes its step and saves; finetune --resume, quantize, sweep, multiple-choice and tournament
continue from there. In a chat, Ctrl-C ends the answer alone. Under nohup a closed terminal ends nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    with patient_streams() as stdout:
        try:
            # the options of all commands take six times as long to make as those of one
            arguments = build_parser(words[:1] if words and words[0] in COMMANDS else COMMANDS).parse_args(words)
        except SystemExit:  # after --help as well
            if _unprinted(stdout, "qlora-lab"):
                raise SystemExit(2) from None
            raise
        with ending_like_ctrl_c():  # SIGTERM and SIGHUP, too
            code = _run(arguments)
        prints = arguments.command in PRINTING or getattr(arguments, "games", None) is not None  # tournament --games
        if code < 2 and (prints or getattr(arguments, "json", False)):  # `open` has no --json
            return 2 if _unprinted(stdout, f"qlora-lab {arguments.command}") else code
        return code


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Make the parser of these commands. Each takes its summary from its docstring, and adds its own options."""
    parser = Parser(
        prog="qlora-lab",
        description="See how QLoRA works, then use it. Each command has its own --help with an example.",
        epilog=EXITS,
    )
    parser.add_argument("--version", action="version", version=f"qlora-lab {ql.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        module = import_module(f"qlora_lab.cli.{name.replace('-', '_')}")
        summary = re.split(r"\.\s|\.$", module.__doc__ or name)[0]  # python -OO keeps no docstring
        command = commands.add_parser(
            name, help=summary[0].lower() + summary[1:], description=f"{summary}.", epilog=f"example: {module.EXAMPLE}"
        )
        # An option without a type takes a name or a path. A shell expands the ~ of `--out ~/x` but not that of
        # `--out=~/x`, which would make a folder called "~".
        command.register("type", None, os.path.expanduser)
        module.add_options(command)
        command.set_defaults(module=module)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    process = 0
    try:
        process = rank()
        if process > 0:
            arguments.quiet = True  # only the first process shows progress and prints
        with _warnings_as_lines(arguments.command, silent=process > 0):
            return arguments.module.run(arguments) or 0
    except KeyboardInterrupt as interrupt:  # one from training says what is saved, and how to resume
        if process == 0:  # the others would repeat it
            print(f"qlora-lab {arguments.command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        advice = getattr(arguments.module, "LESS_MEMORY", LESS_MEMORY)
        message = _message(error, getattr(arguments, "less_memory", advice))  # one that its options choose
        if message is None:  # a bug of ours: its traceback helps to report it
            raise
        which = f" (process {process})" if process else ""
        print(f"qlora-lab {arguments.command}{which}: {one_line(message)}", file=sys.stderr)
        return 2


def _unprinted(stdout: Patient, command: str) -> bool:
    """Return whether some output could not be printed, and if so report it on stderr."""
    stdout.flush()  # a full disk shows at the latest here
    if stdout.error:
        reason = getattr(stdout.error, "strerror", None) or stdout.error
        print(f"{command}: the result could not be printed ({reason})", file=sys.stderr)
    return stdout.error is not None


@contextmanager
def _warnings_as_lines(command: str, silent: bool) -> Iterator[None]:
    """Print each warning to stderr as one line, without the source line that raised it. silent: print none."""
    said = set()  # a test before training and one after it give the same warning, from two places

    def show(message, *_) -> None:
        line = one_line(str(message))
        if not silent and line not in said:
            said.add(line)
            print(f"qlora-lab {command}: {line}", file=sys.stderr)

    with warnings.catch_warnings():  # undone at the end
        warnings.showwarning = show
        yield


def _message(error: Exception, less_memory: str) -> str | None:
    """Describe a mistake, a full disk or full memory; None for a bug."""
    from qlora_lab.model.fetch import ModelError
    from qlora_lab.model.out_of_memory import OutOfMemory, is_out_of_memory

    if is_out_of_memory(error):  # first: some are an OSError, some a RuntimeError
        return str(error) if isinstance(error, OutOfMemory) else f"out of memory: {less_memory}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        advice = ": free some space there, then repeat the command" if error.errno in NO_ROOM else ""
        return f"{error.strerror}: {str(error.filename)!r}{advice}"
    return str(error) if isinstance(error, (*MISTAKES, ModelError)) else None
