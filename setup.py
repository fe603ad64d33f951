"""Builds the native modules with CMake; everything else stands in pyproject.toml."""

import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs cmake once for all modules and installs them where setuptools expects them."""

    def build_extensions(self) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath("pyquiet._cpu")).resolve()
        build = Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", SOURCE, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        prefix = target.parent.parent  # the modules install themselves under pyquiet/
        subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True)

    def copy_extensions_to_source(self) -> None:
        # An earlier build may have left a CUDA module that this one is without.
        (SOURCE / self.get_ext_filename("pyquiet._cuda")).unlink(missing_ok=True)
        super().copy_extensions_to_source()


# pip builds in the source tree: a folder of its own keeps an earlier build out of this one.
with tempfile.TemporaryDirectory(prefix="pyquiet-build-") as folder:
    setup(
        ext_modules=[
            Extension("pyquiet._cpu", sources=[]),
            Extension("pyquiet._cuda", sources=[], optional=True),  # CMakeLists.txt says when it is built
        ],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": folder}},
    )
