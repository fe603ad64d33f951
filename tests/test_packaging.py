"""The source distribution and the wheel: built in isolation, complete, and working on their own."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from build.env import DefaultIsolatedEnv

import pyquiet

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH", "PYQUIET_CUDA")
} | {"PYQUIET_CUDA_ARCHITECTURES": "90a-real"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the checkout, and a wheel that was built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    log = done.stdout + done.stderr
    if "No matching distribution found" in log or "Could not find a version" in log:
        pytest.skip("no package index to take the build requirements from")
    assert done.returncode == 0, log[-3000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows which files are sources")
def test_the_sdist_holds_all_sources_and_no_build_product(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_the_wheel_works_on_its_own(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    assert all(name.startswith(("pyquiet/", "pyquiet-")) for name in names)
    assert {"pyquiet/py.typed", "pyquiet/_cpu.pyi", "pyquiet/_cuda.pyi"} <= set(names)
    modules = {name.split(".")[0] for name in names if name.endswith(".so")}
    assert modules == ({"pyquiet/_cpu", "pyquiet/_cuda"} if NVCC else {"pyquiet/_cpu"})
    assert not [name for name in names if "gomp" in name]
    code = "import pyquiet; from pyquiet import native as n; print(pyquiet.__file__, n.isa(), n.cuda() is not None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    file, isa, has_cuda = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert isa != "None", done.stderr
    assert has_cuda == str(NVCC is not None), done.stderr


def test_the_version_stands_in_one_place(distributions):
    assert distributions[1].name.startswith(f"pyquiet-{pyquiet.__version__}-")


@pytest.fixture(scope="module")
def build_tools(distributions) -> Iterator[DefaultIsolatedEnv]:
    """The build requirements, installed as pip does in isolation; skipped where `distributions` is."""
    with DefaultIsolatedEnv() as tools:
        tools.install(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
        yield tools


Configure = Callable[..., tuple[int, str, bool]]


@pytest.fixture
def configure(build_tools: DefaultIsolatedEnv, tmp_path: Path) -> Configure:
    """Runs cmake's configure step with `nvcc`: exit code, output, and whether the CUDA module would be built."""

    def run(nvcc: str | None, **environment: str) -> tuple[int, str, bool]:
        folders = [Path(f) for f in build_tools.make_extra_environ()["PATH"].split(os.pathsep)]
        path = [hide_nvcc(folder, tmp_path / str(i)) for i, folder in enumerate(folders)]
        if nvcc is not None:
            (tmp_path / "nvcc").write_text(nvcc)
            (tmp_path / "nvcc").chmod(0o755)
            path.insert(0, tmp_path)
        build, python = tmp_path / "build", f"-DPython_EXECUTABLE={build_tools.python_executable}"
        done = subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-GNinja", python],
            env=ENVIRONMENT | {"PATH": os.pathsep.join(map(str, path))} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        plan = build / "build.ninja"
        return done.returncode, " ".join(done.stdout.split()), plan.exists() and "bindings_cuda" in plan.read_text()

    return run


def hide_nvcc(folder: Path, copy: Path) -> Path:
    if not (folder / "nvcc").exists():
        return folder
    copy.mkdir()
    for tool in folder.iterdir():
        if tool.name != "nvcc":
            (copy / tool.name).symlink_to(tool)
    return copy


def test_without_nvcc_only_the_cpu_module_is_built(configure: Configure):
    code, output, cuda = configure(None)
    assert (code, cuda) == (0, False), output
    assert "pyquiet: CPU only, there is no nvcc on PATH" in output


def test_cuda_that_is_demanded_needs_nvcc(configure: Configure):
    code, output, _ = configure(None, PYQUIET_CUDA="1")
    assert code != 0
    assert "PYQUIET_CUDA=1 asks for the CUDA kernels, but there is no nvcc on PATH" in output


BROKEN = "#!/bin/sh\necho 'nvcc fatal: no libdevice' >&2\nexit 3\n"


def test_a_broken_nvcc_fails_with_its_words_and_the_remedy(configure: Configure):
    code, output, _ = configure(BROKEN)
    assert code != 0
    assert "nvcc fatal: no libdevice" in output
    assert "PYQUIET_CUDA=0" in output


def test_cuda_can_be_left_out_without_a_look_at_nvcc(configure: Configure):
    code, output, cuda = configure(BROKEN, PYQUIET_CUDA="0")
    assert (code, cuda) == (0, False), output
    assert "nvcc" not in output


def test_a_misspelt_choice_is_refused(configure: Configure):
    code, output, _ = configure(None, PYQUIET_CUDA="yes")
    assert code != 0
    assert "PYQUIET_CUDA must be 0, 1 or unset, got yes" in output


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_working_nvcc_builds_for_three_generations_and_what_follows(configure: Configure):
    code, output, cuda = configure(f'#!/bin/sh\nexec {NVCC} "$@"\n', PYQUIET_CUDA_ARCHITECTURES="")
    assert (code, cuda) == (0, True), output
    assert "for sm_80, sm_90a, sm_100, compute_100;" in output
