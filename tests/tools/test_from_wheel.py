"""The notebooks of `make test` run from the installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import from_wheel
from tools.stages import STAGES


@pytest.mark.slow
def test_a_kernel_imports_the_wheel_and_not_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(from_wheel, "SITE", tmp_path / "wheel" / "site")
    became = []
    monkeypatch.setattr(os, "execvpe", lambda *call: became.append(call))
    kernel = [sys.executable, "-c", "import qlora_lab; print(qlora_lab.__file__)"]
    from_wheel.main(kernel)
    ((_, command, environment),) = became
    where = from_wheel.ROOT / "notebooks"  # nbval starts a kernel beside its notebook
    file = subprocess.run(command, cwd=where, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(file.strip()).is_relative_to(tmp_path)

    compiled = tmp_path / "wheel" / "site" / "qlora_lab" / "kernels" / "__pycache__" / "compiled"
    compiled.touch()
    from_wheel.install()
    assert compiled.exists()  # the wheel has the same bytes
    (wheel,) = compiled.parents[4].glob("*.whl")
    wheel.write_bytes(b"of another day")
    from_wheel.install()
    assert not compiled.exists() and wheel.stat().st_size > 10_000

    compiled.touch()
    wheel.with_name("qlora_lab-0.0.9-py3-none-any.whl").write_bytes(b"an earlier version")  # is it the one in site?
    from_wheel.install()
    assert not compiled.exists() and list(wheel.parent.glob("*.whl")) == [wheel]


def test_a_library_from_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(from_wheel, "install", lambda: dict(os.environ))
    monkeypatch.setattr(from_wheel, "imported", lambda _: str(tmp_path / "qlora_lab" / "__init__.py"))
    with pytest.raises(SystemExit, match="not from the wheel"):
        from_wheel.main(["true"])


def test_the_stage_of_notebooks_runs_from_it():
    assert STAGES["notebooks"].command[1] == "tools/from_wheel.py"
