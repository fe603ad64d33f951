"""Loading of the native module: the choice of instruction set, and what a missing module does."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyquiet
from pyquiet import native

needs_native = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@needs_native
def test_the_best_supported_level_is_chosen():
    supported = native.cpu.supported_isas()
    assert [w for w in native.cpu.compiled_isas() if w in supported] == supported
    done = python("from pyquiet import native; print(native.isa())", PYQUIET_ISA="")
    assert done.stdout.split() == supported[-1:], done.stderr


@needs_native
def test_every_supported_level_can_be_forced_and_draws_the_same():
    code = """
from pyquiet import native
from pyquiet.randomness import Purpose, Stream, uniforms
print(native.isa(), uniforms(Stream(5, Purpose.DRAFT), 3).tolist())"""
    outputs = set()
    for word in native.cpu.supported_isas():
        isa, numbers = python(code, PYQUIET_ISA=word).stdout.split(maxsplit=1)
        assert isa == word
        outputs.add(numbers)
    assert len(outputs) == 1


@needs_native
@pytest.mark.parametrize("word", ["avx1024", "AVX2", "neon" if os.uname().machine == "x86_64" else "avx2"])
def test_a_wrong_level_is_an_error_that_names_the_allowed_ones(word):
    done = python("from pyquiet import native", PYQUIET_ISA=word)
    assert done.returncode == 1
    assert f"ImportError: PYQUIET_ISA={word} is unknown" in done.stderr
    assert ", ".join(native.cpu.supported_isas()) in done.stderr


def test_a_missing_module_gives_one_warning_and_the_reference_serves():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "pyquiet._cpu":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from pyquiet import native
from pyquiet.randomness import Purpose, Stream, uniforms
print(native.cpu, native.isa(), uniforms(Stream(0, Purpose.DRAFT), 2).shape)"""
    done = python(code)
    assert done.stdout.split("\n")[0] == "None None torch.Size([2])", done.stderr
    assert done.stderr.count("native module is not built") == 1
    assert "pip install -e ." in done.stderr


def test_a_broken_module_raises_its_own_error():
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "pyquiet._cpu":
            raise ModuleNotFoundError("No module named 'libgone'", name="libgone")
sys.meta_path.insert(0, Broken())
from pyquiet import native"""
    done = python(code)
    assert done.returncode == 1
    assert "No module named 'libgone'" in done.stderr
    assert "not built" not in done.stderr


@needs_native
def test_the_stub_lists_what_the_module_has():
    stub = Path(pyquiet.__file__).with_name("_cpu.pyi").read_text()
    declared = {node.name for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)}
    assert declared == {name for name in vars(native.cpu) if not name.startswith("_")}
