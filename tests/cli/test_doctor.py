"""`pyquiet doctor`, and what every command shares: errors in one line, a quick start."""

import json
import platform
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from pyquiet import cli, environment, native
from pyquiet.cli import doctor


def test_json_says_what_is_there(capsys):
    assert cli.main(["doctor", "--json"]) == (0 if native.cpu else 1)
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]["version"] == torch.__version__
    assert report["native"]["isa"] == native.isa()
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["cuda"]["kernels_built"] == (find_spec("pyquiet._cuda") is not None)
    assert len(report["cuda"]["gpus"]) == torch.cuda.device_count()
    assert (report["cuda"]["why_no_gpu"] is None) == torch.cuda.is_available()


@pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
def test_words_name_the_instruction_set_and_the_threads(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"{environment.processor_name()}, {platform.platform()}" in out
    assert f"uses {native.isa()} " in out
    assert f"OpenMP {native.cpu.openmp_threads()}" in out


def test_missing_native_module_is_said_with_the_remedy_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(native, "cpu", None)
    assert cli.main(["doctor"]) == 1
    assert "MISSING" in (out := capsys.readouterr().out)
    assert "pip install -e ." in out
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["native"] == {"found": False, "isa": None, "built": [], "supported": []}


def no_driver():
    raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("driver", "gpus", "remark", "why_unusable"),
    [
        (13010, lambda: [("NVIDIA H100", (9, 0))], "usable (driver: CUDA 13.1)", None),
        (
            13010,
            lambda: [("NVIDIA H100", (9, 0)), ("Tesla T4", (7, 5))],
            "not usable here: ",
            "no code for Tesla T4 (sm_75)",
        ),
        (0, no_driver, "not usable here: ", "there is no NVIDIA driver (cudaErrorInsufficientDriver: "),
        (12080, no_driver, "not usable here: ", "cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
    ],
)
def test_cuda_kernels_are_named_with_what_stops_them(monkeypatch, capsys, driver, gpus, remark, why_unusable):
    module = SimpleNamespace(
        architectures=lambda: ["sm_80", "sm_90a"],
        runtime_version=lambda: 13000,
        driver_version=lambda: driver,
        gpus=gpus,
    )
    monkeypatch.setattr(native, "cuda", lambda: module)
    cli.main(["doctor"])
    line = next(line for line in capsys.readouterr().out.split("\n") if "CUDA kernels" in line)
    assert "built for sm_80, sm_90a with CUDA 13.0" in line
    assert remark + (why_unusable or "") in line
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)["cuda"]
    assert report["architectures"] == ["sm_80", "sm_90a"]
    assert (report["why_unusable"] or "").startswith(why_unusable or "")
    assert (report["why_unusable"] is None) == (why_unusable is None)


def test_missing_cuda_kernels_are_said_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(native, "cuda", lambda: None)
    assert cli.main(["doctor"]) == (0 if native.cpu else 1)
    out = capsys.readouterr().out
    assert "CUDA kernels  not built" in out
    assert "nvcc" in out


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_89"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_80", "compute_100"], (12, 0), True),
        (["sm_80", "compute_100"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_what_runs_on_which_gpu(architectures, capability, runs):
    assert environment.runs_on(architectures, *capability) is runs


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.9.1", "too old"),
        ("2.11.0", "supported"),
        ("2.15.3+cu130", "supported"),
        ("2.16.0a0", "newer than tested"),
        ("3.0", "newer than tested"),
    ],
)
def test_version_status(version, status):
    assert environment.version_status(version, "2.11", "2.15") == status


def test_versions_outside_the_range_are_marked(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    cli.main(["doctor"])
    assert "2.9.1: too old (supported: 2.11 to 2.15)" in capsys.readouterr().out


def test_two_openmp_runtimes_are_pointed_out():
    assert "two OpenMP runtimes" in doctor._thread_words({"torch": 2, "openmp": 4})
    assert "two OpenMP runtimes" not in doctor._thread_words({"torch": 2, "openmp": 2})
    assert "not built in" in doctor._thread_words({"torch": 2, "openmp": 0})


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, error):
    def run(args):
        raise error("first line\n  second line")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "pyquiet: error: first line second line\n"


def test_unknown_command_and_help(capsys):
    assert cli.main(["dream"]) == 2
    assert "COMMAND must be one of demo, think, infill" in capsys.readouterr().err
    with pytest.raises(SystemExit) as right:
        cli.main(["--help"])
    assert right.value.code == 0
    assert "doctor" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pyquiet", "doctor", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["native"]["isa"] == native.isa(), done.stderr
