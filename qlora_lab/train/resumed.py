"""What a resumed run reads of itself: the lines of its log, and the facts of a checkpoint, both checked before use.

In: the log's path and the facts of checkpoint.load_checkpoint. Out: the lines of the first steps, or ValueError with
the file, the line and the key.
Not here: whether the run may go on (run_record.py), tensors (checkpoint.py).
"""

from pathlib import Path

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

LONGEST = 2**14  # bytes of a line, which has about 200
LINE = {"step": whole(1), "loss": NUMBER, "tokens": whole(0), "seconds": NUMBER}
EVALUATED = {"held_out_loss": NUMBER}  # only in the lines of some steps
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
FACTS = dict.fromkeys(("run", "batches", "scaler", "best", "arithmetic"), OBJECT)
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
    if "log_sha256" in facts and facts["log_sha256"] != log_sha256(path, steps):  # earlier versions noted none
        raise ValueError(f"{path} is not what step {steps} was saved with: restore it, or start anew")
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
    check_keys(line, LINE | EVALUATED, where, LINE)
    return line


def check_facts(facts: dict, file: Path) -> None:
    """Raise ValueError, with the file and the key, unless the facts of a checkpoint hold all that a resume takes."""
    check_keys(facts, FACTS, str(file), FACTS)
    for name, rules in PARTS.items():
        needed = () if name == "scaler" else rules  # which is empty where gradients are not scaled
        check_keys(facts[name], rules, f"{file}: {name}", needed)
