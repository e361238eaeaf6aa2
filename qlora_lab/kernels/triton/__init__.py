"""The Triton rungs, one kernel a file, in the order of the ladder; what choose() returns for CUDA is dispatch.py.

1 quantize_nf4, 2 dequantize_nf4, 3 dequantize_double, 4 double_quantize, 5 gemv_nf4, 6 matmul_nf4,
7 matmul_nf4_backward, 8 adamw_8bit. Tables are arguments, so NF4, NF3 and NF2 in 4-bit codes, FP4 and INT4 share them.

With TRITON_INTERPRET=1 in the environment before Python starts, they run on CPU tensors, slowly and exactly.
"""

from subprocess import CalledProcessError

from triton import knobs
from triton.runtime import driver


def refusal() -> str | None:
    """Why the rungs cannot run on this machine's GPU; None if they can."""
    if knobs.runtime.interpret:
        return None
    try:
        target = driver.active.get_current_target()
    except (RuntimeError, OSError, CalledProcessError) as error:  # such as no C compiler, which Triton starts with
        return f"Triton does not start: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if target.backend != "cuda" or target.arch < 75:
        return f"the kernels are written for NVIDIA GPUs from sm_75 on, this is {target.backend} {target.arch}"
    return None


if knobs.runtime.interpret:
    from qlora_lab.kernels.triton import interpreter

    interpreter.mend()
