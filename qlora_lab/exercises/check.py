"""Turn a student's answer into a few printed lines: a prompt, "correct", or what differs and the hint that fits.

An answer is a function with cases to try, or a value: a number, a text, a list, an array, a tensor. A failed case shows
its arguments, what came back and what was wanted; for a value, the wanted one stays secret. Nothing is raised, so a
notebook with open exercises runs to its end.

    check(my_pack, pack, name="my_pack", cases=[(torch.tensor([1, 2, 3]),)])

The hint answers the mistake: hints.py knows the likely ones of each exercise of the course. The same answer gets the
same hint, however often its cell runs; another answer never gets a hint that did not help before.
"""

import copy
import inspect
import math
import reprlib
import sys
import textwrap
from types import CodeType
from typing import NamedTuple

from qlora_lab.exercises import verdicts
from qlora_lab.exercises.hints import EXERCISES, WITHOUT

_said = {}  # name of an exercise -> {hint: the fault it was said about}, until the answer is correct
_OPEN = "not answered yet. Replace the ... and run this cell again."
_RETURN = "Does your function end with `return` and its result? `print` only shows a value."
_RAISES = "Call your function in a cell of its own: Python then shows the line at which it stops."
_TASK = "Read the task again: what kind of answer does it ask for?"
_NOTHING = "Python gives None where nothing was returned. Is a `return` or a value missing?"
_ON_PAPER = "Work this out on paper, step by step, and print the same steps in your code."
_LOOK_ALIKE = 1e-6  # a mistake is recognised although its last digits are rounded differently
_WIDTH = 88  # columns of a hint
_LONGEST = 12  # entries of a list that are shown
_FEW = 8  # numbers of a tensor that are shown
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60  # columns
_WIDEST = 60  # columns of a result that is shown as a whole, and not at its first difference only
_KINDS = {
    "builtins.bool": "True or False",
    "builtins.int": "a number",
    "builtins.float": "a number",
    "builtins.str": "a text",
    "builtins.list": "a list",
    "builtins.tuple": "a tuple",
    "builtins.NoneType": "nothing",
    "builtins.ellipsis": "the three dots",
    "torch.Tensor": "a tensor",
    "numpy.ndarray": "a NumPy array",
}
_CONVERT = {  # (given, wanted): how one becomes the other
    ("a tensor", "a number"): "`.item()` takes the number out of a tensor that holds one.",
    ("a tensor", "a list"): "`.tolist()` makes a list of a tensor.",
    ("a list", "a tensor"): "`torch.tensor(...)` makes a tensor of a list.",
    ("a NumPy array", "a tensor"): "`torch.from_numpy(...)` makes a tensor of a NumPy array.",
    ("a text", "a number"): "Return the number itself, without quotation marks.",
    ("a text", "a tuple"): "Return both results, with a comma between them.",
    ("a number", "a tuple"): "Return both results, with a comma between them.",
}


class Fault(NamedTuple):
    """What is wrong with an answer, in lines, and the hint that fits."""

    lines: list[str]
    hint: str


class Difference(NamedTuple):
    """The first difference of two values, as texts. rule: "kind", "length", "shape" or "dtype", which are no secret."""

    mine: str
    wanted: str
    rule: str = ""
    hint: str = ""


def check(answer, expected, *, name, cases=None, tolerance=0.0):
    """Print how `answer` compares with `expected`; with `cases`, both are functions and each case is their arguments.

    `...` means "not answered yet", as does a function that still returns `...`. Floats agree within `tolerance` (0.0:
    exactly; two NaN agree). Raises TypeError only if the check itself is written wrongly.
    """
    if bool(cases) != callable(expected):
        raise TypeError(f"check {name!r}: give cases=[(argument, ...), ...] and a function as expected, or neither.")
    if answer is ...:
        fault = _OPEN
    elif cases:
        fault = _try(answer, expected, name, cases, tolerance)
    else:
        fault = _try_value(answer, expected, name, tolerance)
    print(f"{name}: {_verdict(name, fault)}")


def _verdict(name, fault):
    if fault == _OPEN:
        verdicts.record(name, verdicts.OPEN)
        return _OPEN
    if fault is None:
        verdicts.record(name, verdicts.PASSED)
        _said.pop(name, None)  # a later mistake may hear each hint again
        return "correct"
    verdicts.record(name, verdicts.FAILED, " ".join(" ".join(fault.lines).split()))
    hint = _unsaid(name, fault)
    hint = textwrap.fill(f"Hint: {hint}", _WIDTH, subsequent_indent="        ") if hint else ""
    return "\n  ".join([f"not yet. {fault.lines[0]}", *fault.lines[1:], *filter(None, [hint])])


def _unsaid(name, fault):
    """Choose the fault's hint, or a general one if the hint was said about another fault, or none."""
    said = _said.setdefault(name, {})
    about = "\n".join(fault.lines)
    return next((hint for hint in (fault.hint, _ON_PAPER) if hint and said.setdefault(hint, about) == about), "")


def _try_value(answer, expected, name, tolerance):
    difference = _differ(answer, expected, tolerance)
    if difference is None:
        return None
    wanted = f"; wanted: {difference.wanted}" if difference.rule else ""
    return Fault([f"Yours: {difference.mine}{wanted}."], difference.hint or _general(name))


def _try(function, expected, name, cases, tolerance):
    """Return the fault of the first case on which the student's function differs, _OPEN, or None."""
    if not callable(function):
        return Fault(
            [f"Yours: {_short(function)}, {_kind(function)}; wanted: a function."],
            "Keep the line that begins with `def`, and write your answer below it.",
        )
    for number, case in enumerate(cases, 1):
        fault = _try_case(function, expected, name, case, tolerance)
        if fault == _OPEN:
            return _OPEN
        if fault:
            call = f"{getattr(function, '__name__', 'answer')}({', '.join(map(_short, case))})"
            return Fault([f"Case {number} of {len(cases)}:", call, *fault.lines], fault.hint)
    return None


def _try_case(function, expected, name, case, tolerance):
    right = expected(*_copy(case))
    try:
        mine, called = _watched(function, _copy(case))
    except Exception as err:  # any error of the student's code is the answer to report
        hint = _RAISES if _is_theirs(function, name) else _general(name)
        return Fault([f"raises   {type(err).__name__}: {str(err).partition(chr(10))[0]}"], hint)
    if mine is ...:
        return _OPEN
    borrowed = _borrowed(function, expected, name, called)
    if borrowed:
        return Fault([f"leaves the work to {borrowed}"], f"Do it without {borrowed}. {_general(name)}")
    if mine is None and right is not None and _is_theirs(function, name):
        return Fault(["returns  nothing"], _RETURN)
    difference = _differ(mine, right, tolerance)
    if difference is None:
        return None
    hint = _known(name, mine, case, tolerance) or difference.hint or _general(name)
    return Fault(_both(mine, right, difference, secret=not case), hint)


def _copy(case):
    """Copy the arguments, because an answer may change them; a generator, or a module, cannot be copied."""
    try:
        return copy.deepcopy(case)
    except TypeError:
        return case


def _both(mine, right, difference, secret):
    """The two values in two lines; a function without arguments is asked for one value, which stays secret."""
    if secret and not difference.rule:
        return [f"returns  {difference.mine}"]
    shown = difference.mine, difference.wanted
    if difference.rule in ("", "length") and not secret:
        whole = _pair(mine, right)
        fits = max(map(len, whole)) <= _WIDEST and whole[0] != whole[1]
        shown = whole if fits else shown
    return [f"returns  {shown[0]}", f"wanted   {shown[1]}"]


def _is_theirs(function, name):
    """Whether the student wrote the function, and not the check one around it."""
    return getattr(function, "__name__", name) in (name, "<lambda>")


def _known(name, mine, case, tolerance):
    """The hint for the mistake that leads to the student's result in this case, if hints.py knows it."""
    exercise = EXERCISES.get(name)
    if exercise is None or len(inspect.signature(exercise).parameters) != len(case):  # another one of the same name
        return ""
    near = max(tolerance, _LOOK_ALIKE)
    return next((hint for wrong, hint in exercise(*_copy(case)) if not _differ(mine, wrong, near)), "")


def _general(name):
    return EXERCISES[name].__doc__ if name in EXERCISES else ""


def _watched(function, case):
    """Call the function; return its result, and the functions that it called: {"module.name": code}."""
    called = {}

    def note(frame, event, _):
        if event == "call":
            called[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] = frame.f_code

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        return function(*case), called
    finally:
        sys.setprofile(before)


def _borrowed(function, expected, name, called):
    """Name the function that gave the answer away: one of the library's, or the check's own, even if copied."""
    for home in WITHOUT.get(name, ()):
        if f"qlora_lab.{home}" in called:
            return f"`{home.split('.')[2]}`"
    reference = getattr(expected, "__code__", None)
    mine = getattr(function, "__code__", None)
    copied = mine and reference and _steps(mine) == _steps(reference)
    return "the function that checks it" if copied or reference in called.values() else None


def _steps(code):
    """What a function does, whatever its variables are called."""
    constants = [_steps(c) if isinstance(c, CodeType) else c for c in code.co_consts if not isinstance(c, str)]
    return code.co_code, code.co_names, constants


def _differ(answer, expected, tolerance):
    """Return the first Difference, or None."""
    try:
        return _first(answer, expected, tolerance, ())
    except (RuntimeError, TypeError, ValueError, OverflowError) as err:  # such as a tensor without data
        reason = str(err).partition("\n")[0]
        return Difference(f"{_kind(answer)} that cannot be read ({reason})", _kind(expected), "kind", _TASK)


def _first(answer, expected, tolerance, index):
    place = f" at index {index[0] if len(index) == 1 else index}" if index else ""
    mine = _kind(answer)
    right = _kind(expected)
    if mine != right and {mine, right} != {"a list", "a tuple"}:  # 1 and 1.0 are both numbers, True is not
        hint = _NOTHING if answer is None else _TASK
        shown = _short(answer)
        shown = f"{shown[:_WIDEST]} ..." if len(shown) > _WIDEST else shown
        return Difference(f"{shown}, {mine}{place}", right, "kind", _CONVERT.get((mine, right), hint))
    if isinstance(expected, (list, tuple)):
        return _first_in_list(answer, expected, tolerance, index)
    if hasattr(expected, "tolist") and expected.shape:  # a tensor or an array
        for rule, mine, right in (
            ("shape", tuple(answer.shape), tuple(expected.shape)),
            ("dtype", answer.dtype, expected.dtype),
        ):
            if mine != right:
                hint = f"`.to({right})` changes the dtype." if rule == "dtype" and "torch" in str(right) else ""
                return Difference(f"{rule} {mine}{place}", f"{rule} {right}", rule, hint)
        return _first_in_list(answer.tolist(), expected.tolist(), tolerance, index)
    if _equal(_scalar(answer), _scalar(expected), tolerance):
        return None
    mine, right = _pair(_scalar(answer), _scalar(expected))
    return Difference(f"{mine}{place}", f"{right}{place}")


def _first_in_list(answer, expected, tolerance, index):
    if len(answer) != len(expected):
        place = f" at index {index}" if index else ""
        return Difference(f"length {len(answer)}{place}", f"length {len(expected)}", "length")
    pairs = enumerate(zip(answer, expected, strict=True))
    return next((d for i, (a, e) in pairs if (d := _first(a, e, tolerance, (*index, i)))), None)


def _equal(answer, expected, tolerance):
    if isinstance(expected, float) or isinstance(answer, float):
        if math.isnan(answer) or math.isnan(expected):  # NaN equals nothing, not even itself
            return math.isnan(answer) and math.isnan(expected)
        return answer == expected or abs(answer - expected) <= tolerance  # inf - inf is NaN, so == first
    return answer == expected


def _scalar(x):
    return x.item() if getattr(x, "shape", None) == () else x  # no import of torch or numpy needed


def _kind(x):
    """Name it as a student would; tensors and arrays without a dimension count as numbers."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in type(_scalar(x)).__mro__]
    named = next((_KINDS[name] for name in names if name in _KINDS), None)
    return named or ("a function" if callable(x) else f"a value of type {type(x).__name__}")


def _pair(answer, expected):
    """Both as short texts, with all digits if six do not tell them apart."""
    short = _short(answer), _short(expected)
    return short if short[0] != short[1] else (repr(answer), repr(expected))


def _short(x, depth=3):
    x = _scalar(x)
    if hasattr(x, "tolist"):
        kind = _kind(x).removeprefix("a ")
        few = len(x.shape) == 1 and len(x) <= _FEW and not getattr(x, "is_meta", False)  # meta: a shape without data
        return f"{kind}({_short(x.tolist())})" if few else f"{kind} {tuple(x.shape)}"
    if isinstance(x, (list, tuple)):
        inside = ", ".join(_short(y, depth - 1) for y in x[:_LONGEST]) if depth else "..."  # a list may hold itself
        inside += ", ..." if len(x) > _LONGEST else ""
        return f"[{inside}]" if isinstance(x, list) else f"({inside}{',' * (len(x) == 1)})"
    return f"{x:.6g}" if isinstance(x, float) else _SHORT.repr(x)
