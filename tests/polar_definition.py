"""What the tests of polar share: its definition, matrices to try, and distances."""

import torch
from torch import Tensor


def conditioned(
    shape: tuple[int, ...], ratio: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Matrices whose singular values fill [ratio, 1], both ends taken."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(
        torch.randn(shape, dtype=dtype, generator=generator), full_matrices=False
    )
    values = torch.rand(u.shape[-1], dtype=torch.float64, generator=generator)
    values = ratio + (1 - ratio) * values
    values[0], values[-1] = ratio, 1
    return (u * values.to(dtype)) @ vh


def polar_factor(v: Tensor, ridge: float = 0.0) -> Tensor:
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    return (u * (values / (values**2 + ridge).sqrt()).to(v.dtype)[..., None, :]) @ vh


def polar_derivative(v: Tensor, grad: Tensor) -> Tensor:
    """dL/dV of the polar factor from singular values, for m <= n."""
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    inner = u.mH @ grad @ vh.mH
    sums = values[..., :, None] + values[..., None, :]
    out = u @ ((inner - inner.mH) / sums) @ vh
    rest = grad - (grad @ vh.mH) @ vh
    return out + (u / values[..., None, :]) @ u.mH @ rest


def to_planar(v: Tensor) -> Tensor:
    return torch.stack([v.real, v.imag], dim=-3)


def from_planar(v: Tensor) -> Tensor:
    return torch.complex(*v.unbind(-3))


def defect(w: Tensor) -> float:
    """max over the matrices of norm_2(W W^H - I)."""
    values = torch.linalg.svdvals(w.to(torch.promote_types(w.dtype, torch.float64)))
    return (1 - values**2).abs().max().item()


def excess(w: Tensor) -> float:
    """Largest singular value minus 1."""
    return torch.linalg.svdvals(w.to(torch.promote_types(w.dtype, torch.float64))).max().item() - 1
