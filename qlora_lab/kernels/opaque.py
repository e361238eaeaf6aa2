"""Keep what torch.compile cannot trace out of its graphs: numba's machine code runs between two of them.
The GPU's kernels are operations of torch (triton/ops.py) and stay in the graph.
"""

from functools import wraps

import torch


def opaque(function):
    """`function` as it is; while torch.compile traces, the graph ends before it and a new one begins after it."""
    outside = torch._disable_dynamo(function)  # the public decorator imports the compiler, 0.9 s

    @wraps(function)
    def call(*args, **kwargs):
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call
