"""Builds `lipfast._C` from csrc/ with CMake and ninja, and maps kernels/ to `lipfast.kernels`."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90", "100")
CUDA_FOLDERS = ("/usr/local/cuda",)


def main() -> None:
    compiler = find_compiler()
    if compiler is None:
        if os.environ.get("LIPFAST_CUDA") == "1":
            raise SystemExit(
                "LIPFAST_CUDA=1, but no C++ compiler was found: install g++ or clang++, or set CXX"
            )
        print("lipfast: no C++ compiler was found; installing without lipfast._C", file=sys.stderr)
    setup(
        packages=[*find_packages(include=["lipfast", "lipfast.*"]), "lipfast.kernels"],
        package_dir={"lipfast.kernels": "kernels"},
        package_data={"lipfast": ["py.typed"], "lipfast.report": ["*.j2", "templates/*"]},
        ext_modules=[Extension("lipfast._C", sources=[])] if compiler else [],
        cmdclass={"build_ext": CMakeBuild},
    )


class CMakeBuild(build_ext):
    """Configures and builds the extension in build/cmake/, which the next build reuses."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        options = cmake_options()
        # Keyed by everything that CMake cannot change in place: where the checkout lies, the
        # interpreter, the compilers, the architectures.
        identity = "\n".join([str(ROOT), os.environ.get("CXX", ""), *options])
        folder = ROOT / "build" / "cmake" / hashlib.sha256(identity.encode()).hexdigest()[:12]
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # Build isolation puts pybind11 in a new folder each time: the link keeps the compiler's
        # command line, and so the objects of the last build, unchanged.
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "pybind11"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11_include(), target_is_directory=True)
        tools = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPYBIND11_INCLUDE_DIR={link}"]
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *tools, *options]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", folder], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


def cmake_options() -> list[str]:
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-DPYTHON_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
    ]
    nvcc, absent = find_cuda()
    if nvcc is None:
        return [*options, "-DLIPFAST_CUDA=OFF", f"-DLIPFAST_CUDA_ABSENT={absent}"]
    archs = cuda_archs(nvcc)
    code = [f"{arch}-real" for arch in archs] + [f"{newest(archs)}-virtual"]
    return [
        *options,
        "-DLIPFAST_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(code)}",
    ]


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, which must then exist, or the first of c++, g++, clang++."""
    named = os.environ.get("CXX", "").strip()
    if named:
        if shutil.which(shlex.split(named)[0]) is None:
            raise SystemExit(f"CXX={named}: no such compiler")
        return named
    return next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def find_cuda() -> tuple[str | None, str]:
    """The nvcc to build the CUDA part with, or None and the reason why there is no CUDA part."""
    wanted = os.environ.get("LIPFAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"LIPFAST_CUDA={wanted}: expected 0, 1 or nothing")
    if wanted == "0":
        return None, "LIPFAST_CUDA=0 when lipfast was built"
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "LIPFAST_CUDA=1, but nvcc was not found in $CUDACXX, $CUDA_HOME/bin, $CUDA_PATH/bin, "
            f"PATH or {', '.join(CUDA_FOLDERS)}: install the CUDA toolkit "
            "(https://developer.nvidia.com/cuda-downloads), or set CUDACXX to its nvcc"
        )
    return nvcc, "nvcc was not found when lipfast was built"


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    if named:
        if shutil.which(named) is None:
            raise SystemExit(f"CUDACXX={named}: no such compiler")
        return shutil.which(named)
    homes = [home for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    in_homes = [str(Path(home) / "bin" / "nvcc") for home in homes]
    in_defaults = [str(Path(home) / "bin" / "nvcc") for home in CUDA_FOLDERS]
    return next(filter(None, map(shutil.which, [*in_homes, "nvcc", *in_defaults])), None)


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for, as in "90": LIPFAST_CUDA_ARCHS, or the defaults nvcc knows."""
    answer = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = re.findall(r"compute_(\w+)", answer.stdout)
    wanted = re.split(r"[\s,;]+", os.environ.get("LIPFAST_CUDA_ARCHS", "").strip(" ,;"))
    if wanted == [""]:
        return [arch for arch in DEFAULT_ARCHS if arch in known] or [newest(known)]
    for arch in wanted:
        if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in known:
            raise SystemExit(
                f"LIPFAST_CUDA_ARCHS: {arch!r} is not an architecture of {nvcc}; "
                f"expected a list such as 80,90 out of {', '.join(known)}"
            )
    return wanted


def newest(archs: list[str]) -> str:
    return max(archs, key=lambda arch: int(arch.rstrip("af")))


def find_tool(name: str) -> str:
    """Path of cmake or ninja: beside this interpreter, or on PATH."""
    scripts = str(Path(sys.executable).parent)
    path = shutil.which(name) or shutil.which(name, path=scripts)
    if path is None:
        raise SystemExit(f"building lipfast needs {name}: pip install {name}")
    return path


def pybind11_include() -> Path:
    try:
        import pybind11
    except ImportError:
        raise SystemExit("building lipfast needs pybind11: pip install pybind11") from None
    return Path(pybind11.get_include())


if __name__ == "__main__":
    main()
