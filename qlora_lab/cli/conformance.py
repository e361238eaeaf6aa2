"""Run golden vectors through implementations of 4-bit quantization, and compare bytes and values."""

import argparse
import json
import warnings

from qlora_lab.cli.options import common
from qlora_lab.cli.printing import table

EXAMPLE = "qlora-lab conformance --backend cpu --backend bitsandbytes"
NAMES = "reference, cpu, cpu-plain, triton, bitsandbytes, torchao"  # of export/backends.py, which imports torch


def add_options(parser: argparse.ArgumentParser) -> None:
    several = f"what to judge: {NAMES}; may be repeated (default: all that are installed)"
    parser.add_argument("--backend", action="append", metavar="NAME", help=several)
    common(parser)


def run(a: argparse.Namespace) -> int:
    reports, failures = _reports(a)
    if reports:
        _print(a, reports)
    if failures:
        raise failures[0]  # after what the others found
    return 1 if any(report.findings for report in reports) else 0


def _print(a: argparse.Namespace, reports: list) -> None:
    if a.json:
        print(json.dumps([report.to_dict() for report in reports]))
    else:
        print(table([_row(verdicts) for verdicts in zip(*(_named(report) for report in reports), strict=True)]))
        for report in reports:
            print(f"\n{report.backend} {report.version}. {report.counted}.", *_differences(report), sep="\n")


def _reports(a: argparse.Namespace) -> tuple[list, list[ChildProcessError]]:
    """Judge each backend that is named, or all; one that is not named may be missing. Also returns failures."""
    from qlora_lab.export.backends import BACKENDS, NotHereError, check_backend
    from qlora_lab.export.conformance import conformance

    chosen = dict.fromkeys(a.backend or BACKENDS)  # each once, in the order given
    for name in chosen:
        check_backend(name)  # before seconds of work on another one
    reports = []
    failures = []
    for name in chosen:
        try:
            reports.append(conformance(name, progress=not a.quiet))
        except NotHereError as absent:
            if a.backend:
                raise
            if not a.quiet:
                warnings.warn(str(absent), stacklevel=2)
        except ChildProcessError as failure:
            failures.append(failure)
    return reports, failures


def _named(report) -> list[tuple]:
    return [(report.backend, verdict) for verdict in report.verdicts]


def _row(verdicts: tuple) -> dict[str, str]:
    """One case: its name, and each backend's verdict."""
    return {"case": verdicts[0][1].case} | {backend: verdict.verdict for backend, verdict in verdicts}


def _differences(report) -> list[str]:
    """Lines: each reason, and below it the verdicts that it explains, with what differs."""
    lines = []
    for why, verdicts in report.by_reason().items():
        lines.append(f"  {why or 'No reason is known; please report it.'}")
        lines += [f"    {one.case}: {one.verdict} ({one.detail})" for one in verdicts]
    return lines
