"""Run a Python program in a child of a process that has torch and transformers loaded: a start costs 0.1 s, not 6 s.

    done = run([sys.executable, "-m", "qlora_lab.cli", "quantize", ...])   as subprocess.run: exit code, out, err
    child = program([sys.executable, "-c", code], err=path)                as subprocess.Popen: it runs meanwhile
    child = start(function, *arguments)                                    a function that can be pickled

The child is a process of its own: its `__main__`, its streams by number, its memory and its signals are no other's.
The server has computed nothing, so no threads are lost in a fork, and kernels run as after any start.
Not here: what an interpreter reads before its first line (PYTHON..., MALLOC_..., OMP_NUM_THREADS), what an import
costs or drags in, and a stream that is closed. A test of these starts an interpreter with subprocess.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# At the head of a program whose memory is measured: glibc gives a free block back at once. By default it keeps up to
# 90 MiB for later, by chance. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ say the same before a process begins.
GIVE_BACK = """
import ctypes
for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    assert ctypes.CDLL(None).mallopt(option, 65536)
"""


def context():
    """The forkserver's, where it runs: one a worker of pytest, started when it is first needed."""
    CONTEXT.set_forkserver_preload(["tests.warm_server"])  # does nothing once the server runs
    with chdir(ROOT):  # from where Python 3.11's server imports, whatever sys.path is here
        forkserver.ensure_running()
    return CONTEXT


def start(target, *args, **kwargs) -> multiprocessing.Process:
    """A process that calls `target`."""
    child = context().Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def program(words, *, cwd=None, env=None, out=os.devnull, err=os.devnull) -> multiprocessing.Process:
    """The process of a command line that begins with sys.executable; out, err: files to write."""
    first, *words = map(str, words)
    assert first == sys.executable, f"{first} is another interpreter than {sys.executable}"
    return start(_become, words, str(cwd or Path.cwd()), dict(env or os.environ), str(out), str(err))


def run(words, *, cwd=None, env=None, timeout=600, check=False) -> subprocess.CompletedProcess:
    """Wait for a program, whose streams are captured as text. A program that takes too long is killed: exit code -9.

    check: raises CalledProcessError, with what the program said, for any exit code but 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = program(words, cwd=cwd, env=env, out=out, err=err)
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
        done = subprocess.CompletedProcess(words, child.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)  # the exception's own text leaves it out
        done.check_returncode()
    return done


def _become(words: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """What `python words` does after its start."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_CREAT), number)  # by number: C writes there, too
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
