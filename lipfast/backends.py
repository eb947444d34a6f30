"""Which implementation an op runs: the names, the choice, and the reasons against."""

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipfast.transforms import why_not_transformed

# "torch" is plain PyTorch like "reference", arranged for speed.
BACKENDS = ("triton", "cuda", "cpp", "torch", "reference")

ENVIRONMENT_VARIABLES = (
    "LIPFAST_BACKEND",
    "LIPFAST_DATA",
    "TRITON_INTERPRET",
    "LIPFAST_CUDA",
    "LIPFAST_CUDA_ARCHS",
    "CXX",
    "CUDACXX",
    "CUDAHOSTCXX",
    "CUDA_HOME",
    "CUDA_PATH",
)

CanRun = Callable[..., str | None]


class _Rule(NamedTuple):
    device: str
    min_elements: int
    order: tuple[str, ...]


# The fastest first, for tensors of at least so many elements: the first rule that fits counts, and
# "reference" ends every order. The crossovers are measured by bench/bench_<op>.py. maxmin has none:
# below about 1000 elements the published form is 20 us faster, but derives otherwise at ties.
_FASTEST: dict[str, tuple[_Rule, ...]] = {
    "cayley": (_Rule("cpu", 0, ("cpp", "torch")), _Rule("cuda", 0, ("torch",))),
    "conv_norm": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
    "conv_norm_bound": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
    "fourier_conv": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
    "block_conv": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
    # the Triton and CUDA kernels have not been timed on a GPU yet
    "aol_rescale": (_Rule("cpu", 0, ("cpp", "torch")), _Rule("cuda", 0, ("torch",))),
    "gram_bound": (_Rule("cpu", 0, ("cpp", "torch")), _Rule("cuda", 0, ("torch",))),
    "maxmin": (_Rule("cpu", 0, ("cpp",)), _Rule("cuda", 0, ("triton", "cuda"))),
    "polar": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
    # recomputing pays in memory, not in time: 0.66 to 0.85 of the published speed on a CPU
    "residual_conv": (_Rule("cuda", 0, ("torch",)),),
    "skew_exp": (_Rule("cpu", 0, ("torch",)), _Rule("cuda", 0, ("torch",))),
}

_can_run: dict[str, Mapping[str, CanRun]] = {}
_forced: str | None = None
_environment = os.environ.get("LIPFAST_BACKEND") or None
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
_has_triton = importlib.util.find_spec("triton") is not None


def set_backend(name: str | None) -> None:
    """Force one backend for every op of the process, or with None let each op choose.

    While one is forced, an op that does not have it, or cannot run it on its arguments, raises a
    ValueError with the reason; nothing falls back silently. A call's own `backend=` argument goes
    first, then this setting, then LIPFAST_BACKEND.

    Raises:
        ValueError: `name` is none of "triton", "cuda", "cpp", "torch", "reference".
    """
    global _forced
    _forced = _checked(name, "backend")


class backend:
    """Context manager that forces a backend as `set_backend` does, and restores the last setting.

    The setting belongs to the process, not to a thread.
    """

    def __init__(self, name: str | None) -> None:
        self.name = _checked(name, "backend")
        self.outer: list[str | None] = []

    def __enter__(self) -> None:
        global _forced
        self.outer.append(_forced)
        _forced = self.name

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self.outer.pop()


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


def register(op: str, can_run: Mapping[str, CanRun]) -> None:
    """Give the backends that `op` has, each with a predicate: None, or why it cannot run."""
    _can_run[op] = can_run


def choose(op: str, x: Tensor, *args: Any, backend: str | None = None) -> str:
    """Return the backend for one call of `op`: the forced one, or the fastest that can run.

    Args:
        op: a registered op.
        x: the argument whose device and size decide; goes to the predicates with `args`.
        backend: the call's own choice, which goes before `set_backend` and LIPFAST_BACKEND.

    Raises:
        ValueError: the forced backend is unknown, `op` does not have it, or it cannot run.
    """
    if backend is not None:
        _checked(backend, f"{op}: backend")
    chosen = backend or forced()
    if chosen is None:
        return _fastest(op, x, *args)
    reason = why_not(op, chosen, x, *args)
    if reason is not None:
        raise ValueError(f"{op}: backend {chosen!r} cannot run: {reason}")
    return chosen


def forced() -> str | None:
    """Return the backend of `set_backend`, else of LIPFAST_BACKEND, else None.

    Raises:
        ValueError: LIPFAST_BACKEND names no backend.
    """
    return _forced or _checked(_environment, "environment variable LIPFAST_BACKEND")


def why_not(op: str, backend: str, *args: Any) -> str | None:
    """Return why `op` cannot run on `backend` with these arguments, or None if it can."""
    if backend not in _can_run[op]:
        return f"{op} has only the backends {', '.join(_can_run[op])}"
    reason = None if backend == "reference" else why_not_transformed(*args)
    if reason is not None:
        return reason
    return _can_run[op][backend](*args)


def _fastest(op: str, x: Tensor, *args: Any) -> str:
    for rule in _FASTEST.get(op, ()):
        if rule.device != x.device.type or (rule.min_elements and x.numel() < rule.min_elements):
            continue
        for name in rule.order:
            if why_not(op, name, x, *args) is None:
                return name
        break
    return "reference"


def triton_can_run(x: Tensor, *_: Any) -> str | None:
    """Return why Triton kernels cannot run on x, or None."""
    if not _has_triton:
        return "triton is not installed"
    if _interpreting:
        return None if x.device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on the CPU only"
    return _no_gpu(x)


def cuda_can_run(x: Tensor, *_: Any) -> str | None:
    """Return why the CUDA kernels of lipfast._C cannot run on x, or None."""
    reason = _no_cuda_part() or _no_gpu(x)
    if reason is not None:
        return reason
    device = torch.cuda.get_device_properties(x.device)
    if _compiled_for(device.major, device.minor):
        return None
    arch = f"{device.major}{device.minor}"
    return (
        f"lipfast._C holds code for {_extension.cuda_archs} and the GPU is sm_{arch}: "
        f"build with LIPFAST_CUDA_ARCHS={arch}"
    )


def cpp_can_run(x: Tensor, *_: Any) -> str | None:
    """Return why the C++ kernels of lipfast._C cannot run on x, or None."""
    if _extension is None:
        return _no_extension
    if x.device.type != "cpu":
        return f"it needs a CPU tensor, got one on {x.device}"
    return None


def _no_cuda_part() -> str | None:
    if _extension is None:
        return _no_extension
    if _extension.cuda_absent is not None:
        return f"lipfast._C has no CUDA part: {_extension.cuda_absent}"
    return None


def _no_gpu(x: Tensor) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    return None if x.device.type == "cuda" else f"it needs a CUDA tensor, got one on {x.device}"


def _compiled_for(major: int, minor: int) -> bool:
    """Whether lipfast._C has machine code for this GPU, or PTX that its driver can compile."""
    for entry in _extension.cuda_archs.split(","):
        arch, _, kind = entry.partition("-")
        number = int(arch.rstrip("af"))
        built = (number // 10, number % 10)
        if kind == "virtual" and built <= (major, minor):
            return True
        if kind == "real" and built[0] == major and built[1] <= minor:
            return True
    return False


def _load_extension() -> tuple[Any, str]:
    try:
        return importlib.import_module("lipfast._C"), ""
    except ModuleNotFoundError:
        return None, (
            "lipfast._C is not built: no C++ compiler was found when lipfast was installed; "
            "install g++ or clang++ (or set CXX), then install lipfast again"
        )
    except ImportError as error:
        return None, f"lipfast._C cannot be loaded: {error}"


_extension, _no_extension = _load_extension()


def extension() -> Any:
    """Return the module lipfast._C; only for backends whose predicate said that they can run."""
    return _extension


def info() -> dict[str, Any]:
    """Return what is installed, built and usable, as a dict of plain values.

    Keys: "lipfast", "python", "torch", "triton" (versions, None where absent), "extension", "gpu",
    "backends" (name -> None if usable on this machine, else the reason), "ops" (op -> backends),
    "environment" (the variables of docs/environment.md that are set).
    """
    gpu = torch.cuda.is_available()
    probe = torch.empty(0, device="cuda" if gpu else "cpu")
    return {
        "lipfast": importlib.import_module("lipfast").__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if _has_triton else None,
        "extension": _extension_info(),
        "gpu": _gpu_info() if gpu else None,
        "backends": {
            "triton": triton_can_run(probe),
            "cuda": cuda_can_run(probe),
            "cpp": cpp_can_run(torch.empty(0)),
            "torch": None,
            "reference": None,
        },
        "ops": {op: list(has) for op, has in _can_run.items()},
        "environment": {
            name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ
        },
    }


def _extension_info() -> dict[str, Any]:
    if _extension is None:
        return {"built": False, "reason": _no_extension}
    return {
        "built": True,
        "openmp_threads": _extension.openmp_threads(),
        "cuda": _extension.cuda_absent is None,
        "cuda_reason": _no_cuda_part(),
        "cuda_archs": _extension.cuda_archs,
        "nvcc": _extension.cuda_version,
    }


def _gpu_info() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "torch_cuda": torch.version.cuda,
    }
