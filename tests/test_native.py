"""Loading of the native modules: the choice of instruction set, and what a missing module or driver does."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pyquiet
from pyquiet import native

needs_native = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
needs_cuda_module = pytest.mark.skipif(find_spec("pyquiet._cuda") is None, reason="the CUDA module is not built")


# The package without what its own file imports, which has no part in this and would take most of the time.
BARE = f"""
import sys, types
sys.modules["pyquiet"] = types.ModuleType("pyquiet")
sys.modules["pyquiet"].__path__ = {pyquiet.__path__!r}
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", BARE + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@needs_native
def test_every_supported_level_can_be_forced_and_draws_the_same_and_the_best_is_the_default():
    code = """
from pyquiet import native
from pyquiet.randomness import Purpose, Stream, uniforms
print(native.isa(), uniforms(Stream(5, Purpose.DRAFT), 3).tolist())"""
    supported = native.cpu.supported_isas()
    assert [w for w in native.cpu.compiled_isas() if w in supported] == supported
    outputs = set()
    for word in ["", *supported]:
        isa, numbers = python(code, PYQUIET_ISA=word).stdout.split(maxsplit=1)
        assert isa == (word or supported[-1])
        outputs.add(numbers)
    assert len(outputs) == 1


@needs_native
@pytest.mark.parametrize("word", ["AVX2", "neon" if os.uname().machine == "x86_64" else "avx2"])
def test_a_wrong_level_is_an_error_that_names_the_allowed_ones(word):
    done = python("from pyquiet import native", PYQUIET_ISA=word)
    assert done.returncode == 1
    assert f"ImportError: PYQUIET_ISA={word} is unknown" in done.stderr
    assert ", ".join(native.cpu.supported_isas()) in done.stderr


@needs_native
def test_the_command_tells_a_wrong_level_in_a_line(tmp_path):
    script = tmp_path / "pyquiet"
    script.write_text(f"{BARE}from pyquiet import native\n")  # what its first import leads to
    for command in ([str(script)], ["-m", "pyquiet"], ["-m", "pyquiet.evaluation.lm_eval"]):
        env = os.environ | {"PYQUIET_ISA": "bogus"}
        done = subprocess.run([sys.executable, *command, "doctor"], env=env, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("pyquiet: error: PYQUIET_ISA=bogus is unknown")
        assert done.stderr.count("\n") == 1


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


@pytest.mark.parametrize(
    "module", [pytest.param("_cpu", marks=needs_native), pytest.param("_cuda", marks=needs_cuda_module)]
)
def test_the_stub_lists_what_the_module_has(module):
    stub = Path(pyquiet.__file__).with_name(f"{module}.pyi").read_text()
    declared = {node.name for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)}
    loaded = native.cpu if module == "_cpu" else native.cuda()
    assert declared == {name for name in vars(loaded) if not name.startswith("_")}


def test_the_cuda_module_is_loaded_when_asked_for_and_no_earlier():
    done = python("del sys.modules['pyquiet']; import pyquiet.cli; print('pyquiet._cuda' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr


@pytest.fixture
def unloaded_cuda(monkeypatch):
    """`native.cuda` as before its first call."""
    monkeypatch.delitem(sys.modules, "pyquiet._cuda", raising=False)
    native.cuda.cache_clear()
    yield
    native.cuda.cache_clear()


def test_a_missing_cuda_module_gives_one_warning(unloaded_cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyquiet._cuda", None)
    with pytest.warns(RuntimeWarning, match="CUDA kernels are not built.*pip install -e") as warned:
        assert (native.cuda(), native.cuda()) == (None, None)
    assert len(warned) == 1


def test_a_broken_cuda_module_raises_its_own_error(unloaded_cuda, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "pyquiet._cuda":
                raise ModuleNotFoundError("No module named 'libgone'", name="libgone")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="libgone"):
        native.cuda()


# A tensor by its attributes, as the module reads the tensors of a torch without the DLPack exchange table.
CALLS = """
import math
from pyquiet import native

class Tensor:
    is_cuda = True
    def __init__(self, *shape, dtype="torch.float32", gpu=0):
        self.shape, self.dtype, self.gpu = shape, dtype, gpu
    def stride(self):
        return tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))
    def data_ptr(self):
        return 1 << 12
    def get_device(self):
        return self.gpu

B, H, G, T, Q, S, P, D = 1, 2, 1, 3, 2, 5, 4, 8
def tensors(dtype, gpu=0):
    query, text, path = (Tensor(*shape, dtype=dtype) for shape in [(B, H, T, Q, D), (B, G, S, D), (B, G, T, P, D)])
    limits = Tensor(B, T, dtype="torch.int64", gpu=gpu)
    return query, text, path, (query, text, text, path, path, limits, None, 1.0, None, None)

cuda = native.cuda()
def forward(dtype, lse_shape=(B, H, T, Q), gpu=0):
    query, text, path, arguments = tensors(dtype, gpu)
    return cuda.thought_attention(*arguments, query, Tensor(*lse_shape), 0)

floats = cuda.thought_attention_backward_workspace(B, H, T, Q, G, S, P)
def backward(dtype, floats=floats):
    query, text, path, arguments = tensors(dtype)
    gradients = (query, text, text, path, path)
    return cuda.thought_attention_backward(
        *arguments, query, query, Tensor(B, H, T, Q), *gradients, Tensor(floats), 0)

print(forward("torch.float64"), forward("torch.float32", (B, H, T, D)), forward("torch.float32", gpu=1),
      backward("torch.float64"), backward("torch.float32", floats + 1))
for call in (forward, backward):
    for dtype in ("torch.float32", "torch.bfloat16", "torch.float16"):
        try:
            call(dtype)
        except RuntimeError as error:
            print(error)"""


@needs_cuda_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is there, and would be given wild addresses")
def test_without_a_driver_the_cuda_module_refuses_bad_arguments_and_names_the_error():
    done = python(CALLS)
    assert done.returncode == 0, done.stderr
    refused, *errors = done.stdout.strip().split("\n")
    assert refused.split() == ["False"] * 5
    assert len(errors) == 6
    assert all("(cuda" in error and "`pyquiet doctor`" in error for error in errors), errors


@needs_cuda_module
def test_the_cuda_module_refuses_tensors_on_the_cpu():
    query, text, path = torch.zeros(1, 2, 3, 2, 8), torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 3, 4, 8)
    arguments = (query, text, text, path, path, torch.ones(1, 3, dtype=torch.int64), None, 1.0, None, None)
    assert native.cuda().thought_attention(*arguments, torch.empty_like(query), None, 0) is False
