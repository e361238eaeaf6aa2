"""Judge an implementation by golden vectors: bytes equal, values equal, refused, or differs.

In: the name of a backend (backends.py), and data/conformance. Out: a Report with one Verdict a case.
  bytes equal   every byte of the checkpoint is the expected one, and it decodes to the expected values
  values equal  some bytes differ, but what they decode to does not
  refused       the backend's own error instead of a result; right where the input holds NaN or infinity
  crashed       any other error
  differs       values differ: its own, or those that it decodes from the expected bytes
A zero equals a zero of either sign. A verdict other than the first is explained by data/conformance/divergences.json,
or it is a finding.
Source of the expected values: exact arithmetic that is none of this library's (data/conformance/README.md).
"""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from tqdm import tqdm

from qlora_lab.export.backends import KEY, Backend, Case, NotHereError, Tensors, check_backend, running
from qlora_lab.files.course import course_path
from qlora_lab.files.home import expanded
from qlora_lab.files.strict_json import LIST, TEXT, decoded, parse, read_json, read_regular

BYTES_EQUAL, VALUES_EQUAL, DIFFERS, REFUSED = "bytes equal", "values equal", "differs", "refused"
CRASHED = "crashed"
LONGEST = 120  # characters of an error's text
AGAIN = "take it again from the repository, or run make.py beside it"
INTERPRET = "TRITON_INTERPRET"
CHILD = """
import json, sys
from qlora_lab.export.conformance import NotHereError, conformance
try:
    found = conformance("triton", sys.argv[1], progress=False).to_dict()
except NotHereError as absent:
    found = {"not_here": str(absent)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Verdict:
    """What one backend makes of one case."""

    case: str
    verdict: str
    detail: str = ""  # what differs, counted
    why: str = ""  # the known reason, empty where there is none
    is_right: bool = False  # bytes equal, or refused where that is expected


@dataclass(frozen=True)
class Report:
    """All verdicts on one backend."""

    backend: str
    version: str
    verdicts: tuple[Verdict, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of cases."""
        return dict(Counter(verdict.verdict for verdict in self.verdicts))

    @property
    def counted(self) -> str:
        """The same in words."""
        words = ", ".join(f"{verdict}: {count}" for verdict, count in self.counts.items())
        return words[0].upper() + words[1:]

    @property
    def findings(self) -> list[Verdict]:
        """Verdicts that are not right and have no known reason."""
        return [verdict for verdict in self.verdicts if not (verdict.is_right or verdict.why)]

    def by_reason(self) -> dict[str, list[Verdict]]:
        """Known reason -> the verdicts that it explains, findings under ""; those that are right are left out."""
        found = {}
        for verdict in self.verdicts:
            if not verdict.is_right:
                found.setdefault(verdict.why, []).append(verdict)
        return found

    def to_dict(self) -> dict:
        """As plain values, for JSON."""
        return asdict(self)


def conformance(backend: str, folder: str | Path | None = None, progress: bool = True) -> Report:
    """Run every case through a backend of BACKENDS.

    folder: of the vectors; None takes those that come with the library. Triton's kernels run in its interpreter, which
    has to be chosen before Triton is imported: in a process of their own.
    Raises ValueError for an unknown backend, and for vectors that are damaged, which it names; NotHereError for a
    backend that cannot run here; ChildProcessError, with its last words, if that process fails.
    """
    check_backend(backend)
    folder = course_path("data", "conformance") if folder is None else expanded(folder)
    cases = read_cases(folder)
    divergences = read_divergences(folder)
    if backend == "triton" and os.environ.get(INTERPRET) != "1":
        return _interpreted(folder)
    with running(backend) as made:
        bar = tqdm(cases, desc=f"conformance, {backend}", unit="case", disable=not progress)
        return Report(backend, made.version, tuple(_verdict(case, made, divergences) for case in bar))


def _interpreted(folder: Path) -> Report:
    # the path goes as an argument, so no character of it is code
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        # the last line of a traceback names the error
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ChildProcessError(f"the process that runs Triton's interpreter failed ({reason}): please report it")
    found = parse(done.stdout.splitlines()[-1], "what the interpreter printed")
    if "not_here" in found:
        raise NotHereError(found["not_here"])
    return Report(found["backend"], found["version"], tuple(Verdict(**verdict) for verdict in found["verdicts"]))


# ------------------------------------------------------------------------------------------------------------- vectors


def read_cases(folder: Path) -> list[Case]:
    """Read cases.json and vectors.safetensors. Raises ValueError, which names the file, for one that is damaged."""
    index = folder / "cases.json"
    content = read_json(index, {"cases": LIST, "vectors_sha256": TEXT}, ("cases", "vectors_sha256"))
    file = folder / "vectors.safetensors"
    raw = read_regular(file)
    if hashlib.sha256(raw).hexdigest() != content["vectors_sha256"]:
        raise ValueError(f"{file} is damaged, its checksum is not the one in cases.json: {AGAIN}")
    try:
        tensors = load(raw)
        return [_case(made, tensors) for made in content["cases"]]
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not describe {file.name} ({type(error).__name__} {error}): {AGAIN}") from None


def _case(made: dict, tensors: Tensors) -> Case:
    prefix = f"{made['name']}."  # "ties.weight.absmax" belongs to the case "ties"
    parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    weight = parts.pop("input")
    values = None if made["refused"] else parts.pop("decoded")
    return Case(**made | {"shape": tuple(made["shape"])}, input=weight, tensors=parts, decoded=values)


def read_divergences(folder: Path) -> list[dict]:
    """Read the known reasons: backends, verdict, cases (patterns) and why. Raises ValueError for a damaged file.

    A backend may name its version: "torchao 0.18" is 0.18 and 0.18.1, but not 0.19.
    """
    file = folder / "divergences.json"
    content = parse(decoded(read_regular(file), str(file)), str(file), expected="a list of divergences")
    wanted = {"backends": list, "cases": list, "verdict": str, "why": str}
    for one in content if isinstance(content, list) else [None]:
        if not isinstance(one, dict) or any(not isinstance(one.get(name), kind) for name, kind in wanted.items()):
            raise ValueError(f"{file} is damaged: each divergence has backends, cases, verdict and why: {AGAIN}")
    return content


# ------------------------------------------------------------------------------------------------------------- verdicts


def _verdict(case: Case, backend: Backend, divergences: list[dict]) -> Verdict:
    verdict, detail = judge(case, backend)
    is_right = verdict == (REFUSED if case.refused else BYTES_EQUAL)
    why = "" if is_right else _why(case.name, backend, verdict, divergences)
    return Verdict(case.name, verdict, detail, why, is_right)


def _why(case: str, backend: Backend, verdict: str, divergences: list[dict]) -> str:
    """Return the reasons for this verdict on this backend: of the first entry that fits."""
    parts = backend.version.split(".")
    names = {backend.name, *(f"{backend.name} {'.'.join(parts[:n])}" for n in range(1, len(parts) + 1))}
    for one in divergences:
        fits = not names.isdisjoint(one["backends"]) and one["verdict"] == verdict
        if fits and any(fnmatchcase(case, pattern) for pattern in one["cases"]):
            return one["why"]
    return ""


def judge(case: Case, backend: Backend) -> tuple[str, str]:
    """Return the verdict on a case, and what differs, counted."""
    try:
        tensors, values = backend.encode(case)
        read = None if case.refused else backend.read(case)
    except Exception as error:  # of another library, or a bug of ours: it must not end the other cases
        message = " ".join(str(error).split())
        named = f"{type(error).__name__}: {message}"
        return (REFUSED, message[:LONGEST]) if re.match(backend.refuses, named) else (CRASHED, named[:LONGEST])
    if case.refused:
        return DIFFERS, "it is quantised"
    # bytes first: where they are equal, values that differ point to a decoder
    bytes_differ = _differing_bytes(tensors, case)
    values_differ = _differing_values("decoded", values, case)
    if read is not None:
        values_differ += _differing_values("read", read, case)
    verdict = DIFFERS if values_differ else VALUES_EQUAL if bytes_differ else BYTES_EQUAL
    return verdict, "; ".join(bytes_differ + values_differ)


def _differing_bytes(tensors: Tensors, case: Case) -> list[str]:
    """Describe what differs from the expected checkpoint, a part an entry."""
    found = _count("codes", _codes(tensors[KEY]), _codes(case.tensors[KEY]))
    found += [f"a further part {name}" for name in sorted(tensors.keys() - case.tensors.keys())]
    for name, want in sorted(case.tensors.items()):
        part = name.removeprefix(f"{KEY}.")
        have = tensors.get(name)
        is_like = have is not None and have.dtype == want.dtype and "quant_state" not in part  # ours stores bytes alone
        if is_like and have.shape != want.shape:
            found.append(f"{part} of shape {tuple(have.shape)} instead of {tuple(want.shape)}")
        if name == KEY:  # the codes, counted above
            continue
        if have is None:
            found.append("constants of another form")
        elif "quant_state" in part:
            same = _facts(have, name) == _facts(want, name)
            found += [] if same else ["another quant_state"]
        else:
            found += _count(part, have.reshape(-1), want.reshape(-1))
    return list(dict.fromkeys(found))  # each once


def _facts(stored: torch.Tensor, name: str) -> dict:
    """Read the JSON text that bitsandbytes stores as a tensor of bytes."""
    return parse(bytes(stored.tolist()).decode(), name)


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """Packed bytes, of any storage dtype, as (2 * n_bytes,) codes."""
    flat = packed.contiguous().view(torch.uint8).reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)


def _differing_values(what: str, values: torch.Tensor, case: Case) -> list[str]:
    return _count(f"{what} values", values.reshape(-1), case.decoded.reshape(-1))  # bitsandbytes makes a vector (1, n)


def _count(what: str, have: torch.Tensor, want: torch.Tensor) -> list[str]:
    if have.dtype != want.dtype or have.shape != want.shape:
        return [f"{what} are {len(have)} of {have.dtype} instead of {len(want)} of {want.dtype}".replace("torch.", "")]
    differ = int((have != want).sum())  # NaN differs from everything; 0 equals -0
    return [f"{differ} of {len(want)} {what}"] if differ else []
