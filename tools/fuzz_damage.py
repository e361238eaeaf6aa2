"""Damage a good file at random, by its bytes or by what the bytes mean.

In: good bytes and a random.Random. Out: bytes. The same draws give the same bytes, on every machine.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 16, 63, 64, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e300]
TEXTS = ["", " ", "x", "nf4", "../../etc/passwd", "/dev/zero", "a$b_c", "<b>x</b>", "`x`", "\x1b[2J", "\ud800", "１２"]
TEXTS += [
    "model.layers.0.mlp.up_proj",
    "(a+)+$",
    "(",
    "{{ 1/0 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "a" * 5000,
]
VALUES = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [{}], {"": None}, [1, 2], ["a"], {"a": {"b": []}}]
SPELLED = ["NaN", "Infinity", "-Infinity", "1e400", "1" * 5000, "[" * 2000, '{"a":' * 2000, "[" * 60 + "]" * 60, "nul"]
TOKENS = [*(json.dumps(value).encode() for value in VALUES), *(text.encode() for text in SPELLED)]
TOKENS += [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b"\\", b"\xed\xa0\x80", b"\x80" * 9, b"\0" * 64]


def damaged(good: bytes, draws: Random, others: list[bytes], structured: Callable[[bytes, Random], bytes]) -> bytes:
    """Apply one to four kinds of damage. In half of the draws the first one damages the structure."""
    content = good
    if draws.random() < 0.5:
        content = structured(content, draws)
        if draws.random() < 0.7:
            return content
    for _ in range(draws.choice((1, 1, 2, 4))):
        content = draws.choice(BYTES)(content, draws, others)
    return content


# --------------------------------------------------------------------------------------------------------------- bytes


def _place(content: bytes, draws: Random) -> int:
    return draws.randrange(len(content) + 1)


def _cut(content, draws, others):
    return content[: _place(content, draws)]


def _flip(content, draws, others):
    if not content:
        return content
    place = draws.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draws.randrange(8)]) + content[place + 1 :]


def _token(content, draws, others):
    place = _place(content, draws)
    return content[:place] + draws.choice(TOKENS) + content[place + draws.choice((0, 1, 4)) :]


def _remove(content, draws, others):
    place = _place(content, draws)
    return content[:place] + content[place + draws.choice((1, 2, 8, 50)) :]


def _repeat(content, draws, others):
    first, last = sorted((_place(content, draws), _place(content, draws)))
    return content[:last] + content[first:last] + content[last:]


def _splice(content, draws, others):
    other = draws.choice(others)
    return content[: _place(content, draws)] + other[_place(other, draws) :]


def _number(content, draws, others):
    """Change a number of two, four or eight bytes, like those in headers of binary files."""
    size = draws.choice((2, 4, 8))
    place = _place(content, draws)
    value = draws.choice((0, 1, -1, 2 ** (8 * size - 1) - 1, len(content), draws.getrandbits(16)))
    return content[:place] + (value % 2 ** (8 * size)).to_bytes(size, "little") + content[place + size :]


BYTES = (_cut, _flip, _flip, _token, _token, _remove, _repeat, _splice, _number)

# ------------------------------------------------------------------------------------------------------------ structure


def in_json(content: bytes, draws: Random) -> bytes:
    """Replace, remove, repeat or rename a value of a JSON text."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return content
    for _ in range(draws.choice((1, 1, 1, 3))):
        tree = _changed(tree, draws)
    return _spelled(tree)


def in_lines(content: bytes, draws: Random) -> bytes:
    """Damage, remove or repeat a line of a JSONL text."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    place = draws.randrange(len(lines))
    kind = draws.randrange(4)
    if kind == 0:
        return b"".join(lines[:place] + lines[place + 1 :])
    if kind == 1:
        return b"".join(lines[: place + 1] + lines[place:])
    return b"".join([*lines[:place], in_json(lines[place], draws) + b"\n", *lines[place + 1 :]])


def in_safetensors(content: bytes, draws: Random) -> bytes:
    """Damage the header as JSON, with its length corrected or not; or put a number such as NaN among the values."""
    size = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + size], content[8 + size :]
    kind = draws.randrange(4)
    if kind == 0 and len(values) >= 4:
        place = draws.randrange(len(values) // 2) * 2
        worst = draws.choice((b"\xff\xff\xff\xff", b"\x80\x7f\x80\x7f", b"\x00\x7c\x00\xfc", b"\0\0\0\0"))
        return content[: 8 + size + place] + worst + content[8 + size + place + 4 :]
    header = in_tensors(header, draws) if kind == 1 else in_json(header, draws)
    claimed = len(header) + (draws.choice((1, -1, 8, 2**40)) if draws.random() < 0.1 else 0)
    return max(0, claimed).to_bytes(8, "little") + header + values


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4"]


def in_tensors(header: bytes, draws: Random) -> bytes:
    """Change the dtype, shape or place of one tensor in a header, such as another dtype on the same bytes."""
    try:
        tree = json.loads(header)
        name = draws.choice([name for name in tree if name != "__metadata__"])
        tensor = tree[name]
        start, stop = tensor["data_offsets"]
        size, turned = stop - start, tensor["shape"][::-1]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return header
    changes = [
        {"dtype": draws.choice(DTYPES)},
        {"shape": draws.choice([[], [0], [size], [1, -1], [2**32, 2**32], turned, [1] * 70])},
        {"data_offsets": draws.choice([[0, 0], [start, start], [stop, start], [start, 2**60], [start + 1, stop + 1]])},
    ]
    tree[name] = tensor | draws.choice(changes)
    if draws.random() < 0.2:
        tree[draws.choice(TEXTS)] = tree.pop(name)
    return _spelled(tree)


def in_words(content: bytes, draws: Random) -> bytes:
    """Exchange, repeat or remove words of a text or a command line, or replace them by hostile ones."""
    between = b"\0" if b"\0" in content else b" "
    words = content.split(between)
    for _ in range(draws.choice((1, 1, 3))):
        place, other = draws.randrange(len(words)), draws.randrange(len(words))
        kind = draws.randrange(4)
        if kind == 0:
            words[place], words[other] = words[other], words[place]
        elif kind == 1:
            words.insert(place, words[other])
        elif kind == 2 and len(words) > 1:
            del words[place]
        else:
            words[place] = draws.choice(TOKENS).replace(b"\0", b"")
    return between.join(words)


def in_numbers(content: bytes, draws: Random) -> bytes:
    """Change numbers of a binary file, most of them near its start."""
    near = content[: draws.choice((32, 256, 2048, len(content)))]
    for _ in range(draws.choice((1, 1, 3))):
        near = _number(near, draws, [])
    return near + content[len(near) :]


def _changed(tree: Any, draws: Random) -> Any:
    """Change one value of `tree`, at any depth."""
    if not isinstance(tree, (dict, list)) or not tree or draws.random() < 0.2:
        return draws.choice(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draws.choice(keys)
    kind = draws.randrange(8)
    changed = tree.copy()
    if kind == 0:
        del changed[key]
    elif kind == 1 and isinstance(tree, dict):
        changed[draws.choice(TEXTS)] = changed.pop(key)
    elif kind == 1:
        changed.append(draws.choice(VALUES))
    elif kind == 2:
        changed[key] = draws.choice(VALUES)
    elif kind == 3:
        changed[key] = tree[draws.choice(keys)]
    else:
        changed[key] = _changed(tree[key], draws)
    return changed


def _spelled(tree: Any) -> bytes:
    """The tree as JSON. Half of a surrogate pair is escaped, so it stays as it is."""
    return json.dumps(tree).encode()
