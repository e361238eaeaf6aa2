"""Turn a student's answer into one printed line: a prompt, "correct", or the first difference and a hint.

An answer is a number, a text, a list, an array, a tensor, or a function with cases to try. The line never shows the
expected answer, and nothing is raised, so a notebook with open exercises runs to its end.

    check(levels, ql.codebook("nf4"), name="levels", hints=["Count the levels below zero.", "Is 0.0 one of yours?"])
    check(my_pack, pack, cases=[(torch.tensor([1, 2, 3]),)], name="my_pack", hints=["Which nibble comes first?"])

The hints get stronger: the first wrong answer shows the first hint, the next one the second. So attempts are counted by
name, as long as the kernel lives, because a student answers by running the same cell again.
"""

import copy
import math

_attempts = {}  # name -> wrong answers since the kernel's start or the last correct answer
_OPEN = "not answered yet"


def check(answer, expected, *, name, hints=(), tolerance=0.0, cases=None):
    """Print how `answer` compares with `expected`; with `cases`, both are functions and each case is their arguments.

    `...` means "not answered yet", as does a function that still returns `...` or None. Floats agree within `tolerance`
    (0.0: exactly; two NaN agree). Raises TypeError only if the check itself is written wrongly.
    """
    if bool(cases) != callable(expected):
        raise TypeError(f"check {name!r}: give cases=[(argument, ...), ...] and a function as expected, or neither.")
    if answer is ...:
        difference = _OPEN
    else:
        difference = _try(answer, expected, cases, tolerance) if cases else _differ(answer, expected, tolerance)
    print(f"{name}: {_verdict(name, difference, hints)}")


def _verdict(name, difference, hints):
    if difference == _OPEN:
        return f"{_OPEN}. Replace the ... and run this cell again."
    if difference is None:
        _attempts.pop(name, None)  # a later mistake starts with the first hint
        return "correct"
    _attempts[name] = attempt = _attempts.get(name, 0) + 1
    hint = f"\n  Hint {min(attempt, len(hints))}: {hints[min(attempt, len(hints)) - 1]}" if hints else ""
    return f"not yet. {difference}{hint}"


def _try(function, expected, cases, tolerance):
    """Describe the first case on which the student's function differs, or return None."""
    if not callable(function):
        return f"Wanted: a function. Yours: {_kind(function)}."
    for number, case in enumerate(cases, 1):
        place = f"Case {number} of {len(cases)}"
        right = expected(*copy.deepcopy(case))
        try:
            answer = function(*copy.deepcopy(case))  # a copy, for an answer may change its input
        except Exception as err:  # any error of the student's code is the answer to report
            return f"{place}: your function raised {type(err).__name__}: {str(err).partition(chr(10))[0]}"
        if answer is ... or (answer is None and right is not None):
            return _OPEN
        difference = _differ(answer, right, tolerance)
        if difference:
            return f"{place}: {difference}"
    return None


def _differ(answer, expected, tolerance, index=()):
    """Describe the first difference, without the expected value, or return None."""
    if _kind(answer) != _kind(expected):  # 1 and 1.0 are both numbers, True is not
        return f"{_at(index)}Wanted: {_kind(expected)}. Yours: {_kind(answer)}."
    if isinstance(expected, (list, tuple)):
        return _differ_list(answer, expected, tolerance, index)
    if hasattr(expected, "tolist") and expected.shape:  # a tensor or an array
        return _differ_array(answer, expected, tolerance, index)
    if not _equal(_scalar(answer), _scalar(expected), tolerance):
        return f"{_at(index) or 'It differs: '}yours is {_scalar(answer)!r}."
    return None


def _differ_list(answer, expected, tolerance, index):
    if len(answer) != len(expected):
        return f"{_at(index)}Its length should be {len(expected)}, yours is {len(answer)}."
    pairs = enumerate(zip(answer, expected, strict=True))
    return next((d for i, (a, e) in pairs if (d := _differ(a, e, tolerance, (*index, i)))), None)


def _differ_array(answer, expected, tolerance, index):
    for what in ("shape", "dtype"):
        mine = getattr(answer, what)
        right = getattr(expected, what)
        if mine != right:
            shown = (tuple(right), tuple(mine)) if what == "shape" else (right, mine)
            return f"{_at(index)}Its {what} should be {shown[0]}, yours is {shown[1]}."
    return _differ_list(answer.tolist(), expected.tolist(), tolerance, index)


def _equal(answer, expected, tolerance):
    if isinstance(expected, float) or isinstance(answer, float):
        if math.isnan(answer) or math.isnan(expected):  # NaN equals nothing, not even itself
            return math.isnan(answer) and math.isnan(expected)
        return answer == expected or abs(answer - expected) <= tolerance  # inf - inf is NaN, so == first
    return answer == expected


def _scalar(x):
    return x.item() if hasattr(x, "item") else x


def _kind(x):
    """Name it as a student would; tensors and arrays without a dimension count as numbers."""
    x = _scalar(x) if getattr(x, "shape", None) == () else x  # no import of torch or numpy needed
    if x is None:
        return "None"
    names = {bool: "True or False", int: "a number", float: "a number", str: "a text", tuple: "a list", list: "a list"}
    return names.get(type(x), f"a {type(x).__module__.split('.')[0]}.{type(x).__name__}".replace("builtins.", ""))


def _at(index):
    return f"First difference at index {index[0] if len(index) == 1 else index}: " if index else ""
