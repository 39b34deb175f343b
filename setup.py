"""Builds the extension module, and with a CUDA toolkit the CUDA back end, with CMake; everything else is in
pyproject.toml.

Environment: PYENGINE_CUDA is auto (the default: build the CUDA back end if there is an nvcc that works), on
or off; PYENGINE_CUDA_ARCHITECTURES the compute capabilities, e.g. 75,80 (default: this machine's GPU, or 80);
PYENGINE_NVCC the nvcc to use.
"""

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
CUDA_LIBRARY = "libpyengine_cuda.so"


def find_program(name: str) -> str:
    """A build tool from PATH, or from the environment whose Python runs this file."""
    for path in (None, sysconfig.get_path("scripts"), os.path.dirname(sys.executable)):
        found = shutil.which(name, path=path)
        if found:
            return found
    raise RuntimeError(f"{name} is needed to build pyengine: pip install {name}")


def find_nvcc() -> str | None:
    """PYENGINE_NVCC, or the nvcc of PyPI's nvidia-cuda-nvcc in this environment; CMake looks elsewhere."""
    named = os.environ.get("PYENGINE_NVCC")
    if named:
        return named
    return next(map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc")), None)


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
            f"-DPYENGINE_CUDA={os.environ.get('PYENGINE_CUDA', 'auto').lower()}",
            f"-DPYENGINE_CUDA_ARCHITECTURES={os.environ.get('PYENGINE_CUDA_ARCHITECTURES', '')}",
        ]
        nvcc = find_nvcc()
        if nvcc is not None:
            configure.append(f"-DPYENGINE_NVCC={nvcc}")
        (output_dir / CUDA_LIBRARY).unlink(missing_ok=True)  # of a build with other settings
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--target", "_C", "pyengine_cuda"], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built_library = Path(self.build_lib) / "pyengine" / CUDA_LIBRARY
        target = ROOT / "pyengine" / CUDA_LIBRARY
        target.unlink(missing_ok=True)
        if built_library.is_file():
            shutil.copy2(built_library, target)


setup(
    ext_modules=[Extension("pyengine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
