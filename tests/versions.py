"""Run the gate for GPU kernels and a part of the tests with other versions of the libraries.

Usage: ``python tests/versions.py [oldest] [device] [newest]``, or ``make check-versions``.

- ``oldest``: every direct dependency at the lowest version that pyproject.toml allows.
- ``device``: PyTorch 2.11, Triton 3.6 and the newest NumPy, on Python 3.12 if that is here.
- ``newest``: every dependency at its newest version.

The environments are made in ``.versions/``, and made anew when pyproject.toml has changed. The
extension is that of the checkout: it serves every Python from 3.11 on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
DEVICE = ("torch==2.11.*", "triton==3.6.*", "numpy>=2.4")
TESTS = (
    "tests/gpu_gate",
    "tests/unit/test_attention_backends.py",
    "tests/unit/test_gpu_host.py",
    "tests/unit/test_head.py",
    "tests/unit/test_inference.py",
    "tests/unit/test_model.py",
    "tests/unit/test_sampler.py",
    "tests/unit/test_decoding.py",
    "tests/unit/test_optim.py",
    "tests/integration/test_recorded_step.py",
    "tests/integration/test_step.py",
)
# Slow, and different with every Triton.
COMPILED = ["tests/gpu_gate/test_hopper.py", "-k", "compiles"]


def uv() -> str:
    """The uv of the environment that runs this, or the one on the path.

    Raises:
        SystemExit: there is none.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise SystemExit("uv is not here; `make setup` installs it")
    return found


def python_for(name: str) -> str:
    """Interpreter of an environment: this one, or for ``device`` a Python 3.12 if there is one."""
    if name != "device":
        return sys.executable
    find = [uv(), "python", "find", "-q", "--no-python-downloads", "3.12"]
    found = subprocess.run(find, capture_output=True, text=True, cwd="/", check=False)
    if found.returncode == 0:
        return found.stdout.strip()
    # uv takes the first python3.12 on the path, and pyenv's does not run unless it is selected.
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    own = sorted(pyenv.glob("versions/3.12*/bin/python"))
    return str(own[-1]) if own else sys.executable


def environment(name: str, base: str) -> Path:
    """The interpreter of the environment, which is made where it is missing or out of date."""
    home = FOLDER / name
    python, stamp = home / "bin" / "python", home / "pyproject.toml"
    project = ROOT / "pyproject.toml"
    if python.exists() and stamp.exists() and stamp.read_bytes() == project.read_bytes():
        return python
    extra = {"oldest": ["--resolution", "lowest-direct"], "device": list(DEVICE), "newest": []}
    print(f"== {name}: installing into {home.relative_to(ROOT)}", flush=True)
    # Seeded as by `python -m venv`: the compiler of PyTorch 2.9 imports setuptools unlisted.
    subprocess.run([uv(), "venv", "-q", "--seed", "--clear", "--python", base, home], check=True)
    install = [uv(), "pip", "install", "-q", "--python", python, "-r", project, "--extra", "dev"]
    subprocess.run([*install, *extra[name]], cwd=ROOT, check=True)
    stamp.write_bytes(project.read_bytes())
    return python


def check(name: str) -> bool:
    """Run the tests in one environment; True if they passed."""
    python = environment(name, python_for(name))
    show = (
        "import sys, torch, triton, numpy; print('==', sys.argv[1], sys.version.split()[0], "
        "'torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
    )
    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([python, "-c", show, name], check=True)
    for tests in (["-m", "not slow", *TESTS], COMPILED):
        command = [python, "-m", "pytest", *tests]
        if subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode:
            return False
    return True


def main() -> None:
    """Check the environments that are named, or all.

    Raises:
        SystemExit: a test failed in one of them.
    """
    results = {name: check(name) for name in sys.argv[1:] or ["oldest", "device", "newest"]}
    words = (f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in results.items())
    print("== " + ", ".join(words))
    if not all(results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
