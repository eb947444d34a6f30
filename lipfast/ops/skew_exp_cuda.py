"""skew_exp on the CUDA kernels of lipfast._C: all terms of an image in one block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import backends

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}  # csrc/maxmin.h: DType


def can_run(x: Tensor, terms: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot compute so many terms of x, or None.

    Args:
        x: (n, c, h, w).
        terms: degree of the polynomial.
        dtype: in which the convolutions run.
    """
    reason = backends.cuda_can_run(x)
    if reason is not None:
        return reason
    if dtype not in _DTYPES:
        return f"it computes in float64, float32 or bfloat16, not in {dtype}"
    return _size_can_run(*x.shape[1:], terms, dtype, x.device.index)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the extension
def _size_can_run(
    c: int, h: int, w: int, terms: int, dtype: torch.dtype, device: int | None
) -> str | None:
    extension = backends.extension()
    if terms > extension.skew_exp_max_terms:
        return f"it takes at most {extension.skew_exp_max_terms} terms, got {terms}"
    gpu = torch.cuda.get_device_properties(device)
    if _tensor_cores(dtype) and gpu.major < 8:
        return f"TF32 and bfloat16 need sm_80 or newer, and the GPU is sm_{gpu.major}{gpu.minor}"
    needed = extension.skew_exp_shared_bytes(c, h, w, _DTYPES[dtype], _tensor_cores(dtype))
    has = getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block)
    if needed > has:
        return f"two maps {(c, h, w)} need {needed} bytes of shared memory, a block has {has}"
    return None


def skew_exp_forward(
    x: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (c, c, kh, kw)
    ratios: Sequence[float],
    a0: float,
    padding_mode: str,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y = a0 z_0 and the terms, z_n = x and z_(k-1) = x + r_k L z_k.

    float32 is multiplied in TF32 where torch lets convolutions do so. Sums are at least float32.

    Args:
        x: float64, float32 or bfloat16; contiguous and channels-last memory is used as it is.
        kernel: of L, odd kh and kw; in any floating dtype.
        ratios: r_1, ..., r_n, at least one.
        a0: factor of the result.
        padding_mode: "zeros" or "circular".
        keep: return the terms; without it only y is written.

    Returns:
        y, in the dtype and memory format of x, and z_1, ..., z_n, (len(ratios), n, c, h, w), each
        in that memory format; without `keep` their first axis is empty.
    """
    return _run("skew_exp_forward_cuda", x, kernel, ratios, a0, padding_mode, keep)


def skew_exp_backward(
    grad: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (c, c, kh, kw)
    ratios: Sequence[float],
    a0: float,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """Return dL/dx and t_1, ..., t_n: h = a0 grad, dL/dx = h; t_k = r_k h, h = -L t_k, dL/dx += h.

    Args:
        grad: dL/dy, as x of `skew_exp_forward`.
        kernel, ratios, a0, padding_mode: as in `skew_exp_forward`.

    Returns:
        dL/dx, in the dtype and memory format of grad, and t_1, ..., t_n, (len(ratios), n, c, h, w),
        each in that memory format.
    """
    return _run("skew_exp_backward_cuda", grad, kernel, ratios, a0, padding_mode, True)


def pack_taps(kernel: Tensor, dtype: torch.dtype, tensor_cores: bool) -> Tensor:
    """Return the taps of a kernel (c, c, kh, kw) as csrc/skew_exp.h wants them."""
    extension = backends.extension()
    group = extension.skew_exp_tile if tensor_cores else extension.skew_exp_each
    rest = -kernel.shape[0] % group
    taps = F.pad(kernel.permute(2, 3, 1, 0).to(dtype), (0, rest, 0, rest))
    if not tensor_cores:
        return taps.contiguous()
    if dtype == torch.float32:  # to TF32, by Dekker's splitting
        large = taps * 8193.0
        taps = large - (large - taps)
    together = 8 // dtype.itemsize
    return taps.unflatten(2, (-1, together)).transpose(3, 4).contiguous()


def _tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products are those of tensor cores: float32 where torch's convolutions allow TF32."""
    if dtype != torch.float32:
        return dtype == torch.bfloat16
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return cudnn.conv.fp32_precision == "tf32"
    return cudnn.allow_tf32


def _run(
    function: str,
    x: Tensor,
    kernel: Tensor,
    ratios: Sequence[float],
    a0: float,
    padding_mode: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    n, c, h, w = x.shape
    kh, kw = kernel.shape[2:]
    channels_last = not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty_like(x)
    # one tensor in the layout of x: its first n maps are the first term, and so on
    count = len(ratios) if keep else 0
    terms = torch.empty((count * n, c, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
    if x.numel() == 0:
        return out, terms.view(count, n, c, h, w)
    tensor_cores = _tensor_cores(x.dtype)
    taps = pack_taps(kernel, x.dtype, tensor_cores)
    extension = backends.extension()
    params = extension.SkewExpParams(
        x=x.data_ptr(),
        taps=taps.data_ptr(),
        out=out.data_ptr(),
        terms=terms.data_ptr() if keep else 0,
        batch=n,
        channels=c,
        height=h,
        width=w,
        kh=kh,
        kw=kw,
        circular=padding_mode == "circular",
        channels_last=channels_last,
        dtype=_DTYPES[x.dtype],
        tensor_cores=tensor_cores,
        a0=a0,
        ratios=list(ratios),
    )
    with torch.cuda.device(x.device):
        getattr(extension, function)(params, torch.cuda.current_stream(x.device).cuda_stream)
    return out, terms.view(count, n, c, h, w)
