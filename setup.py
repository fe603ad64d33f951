"""Builds the native module with CMake; everything else stands in pyproject.toml."""

import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Runs cmake for `pyquiet._cpu` and installs it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        prefix = target.parent.parent  # the module installs itself under pyquiet/
        subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True)


# pip builds in the source tree: a folder of its own keeps an earlier build out of this one.
with tempfile.TemporaryDirectory(prefix="pyquiet-build-") as folder:
    setup(
        ext_modules=[Extension("pyquiet._cpu", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": folder}},
    )
