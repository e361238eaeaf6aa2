"""Run a command whose kernels and subprocesses import the library from a wheel, as someone without a clone does.

    python tools/from_wheel.py pytest --nbval notebooks

In: the checkout. Out: the command's exit code, after the wheel was built and is installed in build/wheel. The process
becomes the command, so that Ctrl-C reaches it.

Not here: what the wheel holds (tests/test_wheel.py).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "wheel" / "site"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def install() -> dict[str, str]:
    """Build the wheel and install it alone. Returns the environment that imports it.

    A wheel with the bytes of the one that is installed changes nothing: the kernels that its library has compiled lie
    beside it, and the next stage would compile them again for minutes.
    """
    built = SITE.parent / "built"
    shutil.rmtree(built, ignore_errors=True)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = built.glob("*.whl")
    earlier = list(SITE.parent.glob("*.whl"))  # of another version, perhaps
    if [file.name for file in earlier] != [wheel.name] or earlier[0].read_bytes() != wheel.read_bytes():
        for file in earlier:
            file.unlink()
        shutil.rmtree(SITE, ignore_errors=True)
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(SITE), str(wheel)], check=True)
        wheel.replace(SITE.parent / wheel.name)  # last: what was interrupted is done again
    return os.environ | {"PYTHONPATH": str(SITE)}


def imported(environment: dict[str, str]) -> str:
    """Where Python finds the library, outside of the checkout."""
    command = [sys.executable, "-c", "import qlora_lab; print(qlora_lab.__file__)"]
    found = subprocess.run(command, cwd=SITE.parent, env=environment, check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main(command: list[str]) -> None:
    """Become the command."""
    environment = install()
    file = imported(environment)
    if not Path(file).is_relative_to(SITE):
        raise SystemExit(f"the library comes from {file}, not from the wheel in {SITE}")
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
