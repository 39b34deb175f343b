"""Builds the extension module with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_program(name: str) -> str:
    """A build tool from PATH, or from the environment whose Python runs this file."""
    for path in (None, sysconfig.get_path("scripts"), os.path.dirname(sys.executable)):
        found = shutil.which(name, path=path)
        if found:
            return found
    raise RuntimeError(f"{name} is needed to build pyengine: pip install {name}")


class CMakeBuild(build_ext):
    """Leaves the extension where setuptools wants it, which copies it to the source tree if editable."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve() / "cmake"
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = find_program("cmake")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYENGINE_OUTPUT_DIR={output_dir}",
            "-DPYENGINE_TESTS=OFF",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--target", "_C"], check=True)


setup(
    ext_modules=[Extension("pyengine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
