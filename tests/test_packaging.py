"""The source distribution and the wheel: built in isolation, complete, and working on their own."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyquiet

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the checkout, and a wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if "No matching distribution found" in log or "Could not find a version" in log:
        pytest.skip("no package index to take the build requirements from")
    assert done.returncode == 0, log[-3000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows which files are sources")
def test_the_sdist_holds_all_sources_and_no_build_product(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "pyquiet", "CMakeLists.txt", "setup.py", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(tracked) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_the_wheel_works_on_its_own(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    assert all(name.startswith(("pyquiet/", "pyquiet-")) for name in names)
    assert {"pyquiet/py.typed", "pyquiet/_cpu.pyi"} <= set(names)
    assert [name for name in names if name.startswith("pyquiet/_cpu.") and name.endswith(".so")]
    assert not [name for name in names if "gomp" in name]
    code = "import pyquiet; from pyquiet import native; print(pyquiet.__file__, native.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    file, isa = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert isa != "None", done.stderr


def test_the_version_stands_in_one_place(distributions):
    assert distributions[1].name.startswith(f"pyquiet-{pyquiet.__version__}-")
