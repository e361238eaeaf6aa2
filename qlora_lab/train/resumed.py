"""Check what a resumed run reads before it uses it: the log, and the facts and tensors of a checkpoint.

Checksums prove that a file is what was written; this, that what was written fits the run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_lab.files.checksums import log_sha256
from qlora_lab.files.strict_json import (
    NUMBER,
    OBJECT,
    TEXT,
    Rule,
    check_keys,
    check_regular,
    decoded,
    or_null,
    parse,
    whole,
)
from qlora_lab.kernels.product import Race
from qlora_lab.optim.adamw_8bit import BLOCK
from qlora_lab.optim.master_copies import MASTER
from qlora_lab.quant.finite import first_not_finite

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor
Tensors = dict[str, torch.Tensor]
LONGEST = 2**14  # bytes of a line; a real one has about 200
LINE = {"step": whole(1), "loss": NUMBER, "tokens": whole(0), "seconds": NUMBER}
EVALUATED = {"held_out_loss": NUMBER}  # only in the lines of some steps
# not in those of earlier versions
COST = {"processor_seconds": NUMBER, "gpu_seconds_held": NUMBER, "joules": or_null(NUMBER), "joules_note": TEXT}
RACE = or_null(
    Rule(
        f"a list of {len(Race._fields)} numbers",
        lambda value: (
            isinstance(value, list)
            and len(value) == len(Race._fields)
            and all(seconds is None or NUMBER.allows(seconds) for seconds in value)
        ),
    )
)
FACTS = dict.fromkeys(("run", "batches", "scaler", "best", "arithmetic"), OBJECT) | {"log_sha256": TEXT}
DATA = Rule(
    "a JSON object with kept, a whole number, and sha256, a text",
    lambda value: isinstance(value, dict) and type(value.get("kept")) is int and isinstance(value.get("sha256"), str),
)
PARTS = {
    "run": {"data": DATA, "schedule": TEXT}
    | dict.fromkeys(("steps", "batch_size", "max_length"), whole(1))
    | {"seed": whole(0)},
    "batches": dict.fromkeys(("size", "batch_size"), whole(1)) | dict.fromkeys(("seed", "epoch", "position"), whole(0)),
    "scaler": dict.fromkeys(("scale", "growth_factor", "backoff_factor"), NUMBER)
    | dict.fromkeys(("growth_interval", "_growth_tracker"), whole(0)),
    "arithmetic": {"race": RACE},
    "best": {"loss": or_null(NUMBER), "step": whole(0), "since": whole(0)},
}


def read_saved_log(path: Path, steps: int, facts: dict) -> list[dict]:
    """The first `steps` lines of a log, which must be those that the checkpoint with `facts` was saved with."""
    lines = read_log(path, steps)
    if facts["log_sha256"] != log_sha256(path, steps):
        raise ValueError(f"{path} differs from the log saved at step {steps}: restore it, or start a new run")
    return lines


def read_log(path: Path, steps: int) -> list[dict]:
    """The first `steps` lines of a log; later lines are not read."""
    check_regular(path)
    lines = []
    with path.open("rb") as file:
        for number in range(1, steps + 1):
            content = file.readline(LONGEST + 1)
            line = _line(content, path, number) if content else {"step": None}
            if line["step"] != number:
                raise ValueError(f"{path} lacks a line of the first {steps} steps: it was changed by hand")
            lines.append(line)
    return lines


def _line(content: bytes, path: Path, number: int) -> dict:
    where = f"{path}, line {number}"
    if len(content) > LONGEST:
        raise ValueError(f"{where} has more than {LONGEST:,} bytes: it was not written by a run")
    line = parse(decoded(content, where), str(path), line=number)
    if not isinstance(line, dict):
        raise ValueError(f"{where} is a {type(line).__name__}, but a line is a JSON object: it was changed by hand")
    check_keys(line, LINE | EVALUATED | COST, where, LINE)
    return line


def check_facts(facts: dict, file: Path) -> None:
    """Raise ValueError, with the file and the key, unless the facts of a checkpoint hold all that a resume needs."""
    check_keys(facts, FACTS, str(file), FACTS)
    for name, rules in PARTS.items():
        needed = () if name == "scaler" else rules  # without scaling, the scaler's state is empty
        check_keys(facts[name], rules, f"{file}: {name}", needed)


def check_tensors(
    file: Path, tensors: Tensors, adapter: Tensors, parameters: Sequence[torch.Tensor], bits: int
) -> None:
    """Raise ValueError for the first of `tensors` that cannot be the state of this run.

    adapter: what learns, and constants, by their keys. parameters: in the optimizer's order; bits: of its moments. A
    parameter that never had a gradient has no moments.
    """
    wanted = {f"adapter.{key}": (tuple(tensor.shape), tensor.dtype) for key, tensor in adapter.items()}
    for number, parameter in enumerate(parameters):
        kinds = _moments(parameter, bits)
        if any(f"optimizer.{number}.{name}" in tensors for name in kinds):
            wanted |= {f"optimizer.{number}.{name}": kind for name, kind in kinds.items()}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        fault = "is missing" if name in wanted else "is not part of this run"
        raise ValueError(f"{file}: {name} {fault}: resume from another checkpoint, or start a new run")
    for name, kind in wanted.items():
        if fault := _fault(tensors[name], kind):
            raise ValueError(f"{file}: {name} {fault}: resume from another checkpoint")


def _moments(parameter: torch.Tensor, bits: int) -> dict[str, Kind]:
    """What the optimizer keeps for a parameter, by the names of torch's AdamW; in 8 bits, of bitsandbytes'."""
    shape = tuple(parameter.shape)
    scales = (-(-parameter.numel() // BLOCK),)  # (n_blocks,): one per block, the last block may be partial
    step = {"step": ((), torch.float32)}
    if parameter.dtype != torch.float32:  # it learns in a copy
        step |= {MASTER: (shape, torch.float32)}
    if bits == 32:
        return step | dict.fromkeys(("exp_avg", "exp_avg_sq"), (shape, torch.float32))
    codes = dict.fromkeys(("state1", "state2"), (shape, torch.uint8))
    return step | codes | dict.fromkeys(("absmax1", "absmax2"), (scales, torch.float32))


def _fault(tensor: torch.Tensor, kind: Kind) -> str | None:
    shape, dtype = kind
    if tensor.shape != shape or tensor.dtype != dtype:
        return f"is {tensor.dtype} of shape {tuple(tensor.shape)}, but the run has {dtype} of shape {shape}"
    fault = first_not_finite(tensor) if dtype.is_floating_point else None
    return fault and f"holds {fault}"
