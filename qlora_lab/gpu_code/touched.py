"""Compute the bytes, words, codes and constants that one program of the dequantising kernel touches, as indices.

The rules are those of _dequantize_nf4_kernel (kernels/triton); tests/show/test_kernel_map.py compares them with the
addresses that the interpreted kernel uses.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Touched:
    """The indices that one program touches. A lane is one weight of its tile, in the tensor or beyond its end."""

    programs: int  # in the whole grid
    words: range  # loaded, eight codes each
    bytes: range  # packed bytes in those words
    padding: range  # bytes after the packed ones; the launcher puts zeros there
    constants: list[int]  # one for each block with a loaded word
    stored: range  # weights that the program writes
    spare: range  # lanes that it decodes and does not write
    idle: range  # lanes whose word it does not load


def touched(weights: int, block_size: int, tile: int, program: int) -> Touched:
    """Compute what `program` touches: nothing beyond the grid's end, where no program is launched."""
    programs = -(-weights // tile)  # rounded up
    n_words = -(-weights // 8)
    n_bytes = -(-weights // 2)
    first = program * (tile // 8)  # word
    end = first + tile // 8 if program < programs else first
    words = range(first, max(first, min(end, n_words)))  # the kernel's mask of words
    packed = max(4 * first, min(4 * words.stop, n_bytes))  # end of the packed bytes
    stop = max(8 * first, min(8 * words.stop, weights))  # the kernel's mask of weights
    return Touched(
        programs=programs,
        words=words,
        bytes=range(4 * first, packed),
        padding=range(packed, 4 * words.stop),
        constants=sorted({word // (block_size // 8) for word in words}),
        stored=range(8 * first, stop),
        spare=range(stop, 8 * words.stop),
        idle=range(8 * words.stop, 8 * end),
    )
