"""Published layers with their own constants and power iterations, as lipfast layers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import backends, ops, reference
from lipfast.nn import BCOPConv2d, CayleyConv2d, LOTConv2d, SLLConv2d
from lipfast.nn.base import SoundWeights
from lipfast.nn.kernel import (
    KernelModule,
    as_kernel,
    sound_backend,
    stacked,
    stacked_kernels,
)
from lipfast.nn.layers import LipschitzLinear
from lipfast.nn.residual import ResidualModule
from lipfast.ops.context import inside_transforms, is_traced
from lipfast.ops.polar_gemm import polar_backward

_EPSILON = 1e-6
_DEFECT_LIMIT = 1e-3  # of ||I - W W^H||_F beyond that of orthogonal V: where s^2 >= 0.1
_GRADIENT_STEPS = 12  # of conjugate gradients


class PublishedLOTConv2d(LOTConv2d):
    """LOT by ten Newton steps: singular values s / sqrt(s^2 + 1e-4) where they have converged.

    In float32 on a CPU they are taken only for frequencies where `ops.polar`, by fewer steps, has
    not converged, or where the ridge matters to the derivative.
    """

    def _orthogonalise(
        self,
        layers: Sequence[Any],
        matrices: Tensor,
        scale: Tensor,
        planar: bool,
        backend: str | None,
    ) -> Tensor:
        ridge = (self.ridge / scale**2).view(-1, *(1,) * planar)
        fast = backend is None and backends.forced() is None and matrices.dtype == torch.float32
        readable = not is_traced(matrices) and not inside_transforms()
        if not fast or not readable or matrices.device.type != "cpu":
            return newton_factor(matrices, ridge, planar)
        planes = matrices if planar else matrices.unsqueeze(-3)
        factors, defects = RidgedPolar.apply(planes, ridge)
        size = min(matrices.shape[-2:])
        slow = ~(defects <= ridge * size**0.5 + _DEFECT_LIMIT)
        factors = factors if planar else factors.squeeze(-3)
        if not bool(slow.any()):
            return factors
        fixed = newton_factor(matrices[slow], ridge.expand(slow.shape)[slow], planar)
        return factors.index_put((slow,), fixed)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernels = stacked_kernels([self]).double()
        backend = sound_backend(self.weight)
        matrices = self._transfer_matrices([self], kernels, map_size, backend)[0]
        if self._depends_on_map_size:
            matrices = torch.complex(*matrices.unbind(1))
        bound = largest_singular_value(matrices)
        if not self._depends_on_map_size:
            matrices = matrices[:, :, None, None]
        weight, bound = reference.round_contraction(matrices, bound, self.weight.dtype)
        if self._depends_on_map_size:
            weight = torch.stack([weight.real, weight.imag], dim=1)
        return SoundWeights((weight,), bound)


class PublishedBCOPConv2d(BCOPConv2d):
    """BCOP with the published order of the projectors: the kernel's axes are exchanged."""

    def _compose(self, matrices: Tensor, backend: str | None) -> Tensor:
        rows = min(self._inner_channels, self.out_channels)
        fewer_outputs = self._inner_channels > self.out_channels
        factor = matrices[..., 0, :, :].mT if fewer_outputs else matrices[..., 0, :, :]
        halves = matrices[..., 1:, :, : matrices.shape[-1] // 2]
        kernel = ops.block_conv(factor[..., :rows, :], halves, backend=backend).transpose(-2, -1)
        published_transposes = self.kernel_size != (1, 1) and not fewer_outputs
        return kernel.transpose(-4, -3) if published_transposes else kernel


class PublishedCayleyConv2d(CayleyConv2d):
    """Cayley layer whose alpha belongs to the norm of one half of the spectrum.

    The kernel is alpha W / s, s the Frobenius norm of the real Fourier transform on the map. alpha
    becomes s in the first forward pass where the layer has none, as published: an optimizer built
    before does not know it. A 1x1 kernel keeps the s of the first map.
    """

    alpha: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_map_size: tuple[int, int] | None = None

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        KernelModule._make_parameters(self, bias, factory)

    def _transfer_matrices(
        self,
        layers: Sequence[Any],
        kernels: Tensor,
        map_size: tuple[int, int],
        backend: str | None,
    ) -> Tensor:
        scaled = [
            layer._scaled_by_alpha(kernel, map_size)
            for layer, kernel in zip(layers, kernels, strict=True)
        ]
        return super()._transfer_matrices(layers, stacked(scaled), map_size, backend)

    def _scaled_by_alpha(self, kernel: Tensor, map_size: tuple[int, int]) -> Tensor:
        if self._first_map_size is None:
            self._first_map_size = self._last_map_size or map_size
        on_map = map_size if self._depends_on_map_size else self._first_map_size
        kernel, scale = reference.unit_scale(kernel)
        norm = half_spectrum_norm(kernel, on_map)
        if self.alpha is None:
            self.alpha = nn.Parameter((norm * scale).detach().to(self.weight.dtype))
        return kernel * (self.alpha.to(kernel.dtype) * reference.inverse_or_zero(norm))

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        if not self._depends_on_map_size and self._first_map_size is self._last_map_size is None:
            raise ValueError(
                f"input_size: alpha of {type(self).__name__} belongs to the first map that the "
                "layer meets; expected one forward pass before, got none"
            )
        return super()._sound_weights(map_size)

    def _normalised(self, layers: Sequence[Any], kernels: Tensor) -> tuple[Tensor, Tensor]:
        return kernels, kernels.new_ones(len(layers))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.alpha is None and f"{prefix}alpha" in state_dict:
            self.alpha = nn.Parameter(self.weight.new_ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args)


class FoldedResidual(ResidualModule):
    """On a CPU -t is folded into the kernel of the second convolution: no product of maps."""

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if x.device.type != "cpu" or backends.forced() is not None:
            return super()._run(x, weights)
        kernel, bias, scale = weights
        padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
        scale = -scale if scale.dim() == 0 else -scale[:, None, None, None]
        hidden = F.conv2d(x, kernel, bias, padding=padding).relu()
        second = F.conv_transpose2d(hidden, kernel * scale, padding=padding)
        return second.add_(x) if second.dtype == x.dtype else x + second


class PublishedSLLConv2d(FoldedResidual, SLLConv2d):
    """SLL with 1e-6 added to the sums T_ii, zero padding and as many inputs as outputs."""

    def _row_sums(
        self, layers: Sequence[Any], kernels: Tensor, scale: Tensor, backend: str | None
    ) -> Tensor:
        return super()._row_sums(layers, kernels, scale, backend) + _EPSILON / scale**2


class BjorckStepsLinear(KernelModule, LipschitzLinear):
    """Linear layer with the matrix of a fixed number of Bjorck-Bowie steps (Li et al. 2019).

    Args:
        steps: A <- 1.5 A - 0.5 A A^T A in training mode.
        eval_steps: the same in evaluation mode.
        scaled: start from the weight over its norm, estimated in every forward pass in training,
            and once in evaluation mode, by ten steps of a power iteration from a random vector, as
            published; else from the weight.

    See `LipschitzLinear` for the other arguments.
    """

    def __init__(
        self, *args: Any, steps: int = 3, eval_steps: int = 15, scaled: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.eval_steps, self.scaled = steps, eval_steps, scaled

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        matrices = stacked_kernels(layers)[..., 0, 0]
        factors = [
            layer._orthogonalise(matrix, layer.steps)
            for layer, matrix in zip(layers, matrices, strict=True)
        ]
        return (stacked(factors)[..., None, None],)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        matrix = as_kernel(self.weight).double()[:, :, 0, 0]
        matrix = self._orthogonalise(matrix, self.eval_steps)
        kernel, bound = reference.round_contraction(
            matrix[:, :, None, None], largest_singular_value(matrix), self.weight.dtype
        )
        return SoundWeights((kernel,), bound)

    def _orthogonalise(self, matrix: Tensor, steps: int) -> Tensor:
        if self.scaled:
            norm = self._estimated_norm(matrix.detach())
            matrix = matrix * reference.inverse_or_zero(norm)
        return reference.bjorck(matrix, iterations=steps)

    def _estimated_norm(self, matrix: Tensor) -> Tensor:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        u = torch.randn(len(tall), 1, dtype=self.weight.dtype, device=tall.device).to(tall.dtype)
        for _ in range(10):
            v = F.normalize(tall.T @ u, dim=0)
            u = F.normalize(tall @ v, dim=0)
        return (u.T @ tall @ v)[0, 0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrix; zero bias."""
        self.weight.copy_(nn.init.orthogonal_(torch.empty(self.weight.shape)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RidgedPolar(torch.autograd.Function):
    """W = (V V^H + ridge I)^(-1/2) V and ||I - W W^H||_F, planar; derived as if ridge were 0.

    The derivative is off by ridge / s^2, s the smallest singular value.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        real = matrices.shape[-3] == 1
        factors = ops.polar(
            matrices.squeeze(-3) if real else matrices, planar=not real, ridge=ridge
        )
        factors = factors.unsqueeze(-3) if real else factors
        wide = factors.mT if factors.shape[-2] > factors.shape[-1] else factors
        m = wide.shape[-2]
        stack = wide.flatten(-3, -2)
        table = stack @ stack.mT
        gram = table[..., :m, :m]
        defects = gram.new_zeros(gram.shape[:-2])
        if not real:
            gram = gram + table[..., m:, m:]
            defects = (table[..., m:, :m] - table[..., :m, m:]).square().sum((-2, -1))
        identity = torch.eye(m, dtype=gram.dtype, device=gram.device)
        defects = ((gram - identity).square().sum((-2, -1)) + defects).sqrt()
        ctx.save_for_backward(matrices, factors)
        ctx.mark_non_differentiable(defects)
        return factors, defects

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        tensors = (grad, *ctx.saved_tensors)
        tall = grad.shape[-2] > grad.shape[-1]
        wide = [(t.mT if tall else t).flatten(0, -4).contiguous() for t in tensors]
        out = polar_backward(wide[0], wide[1], wide[2], _GRADIENT_STEPS)
        return (out.mT if tall else out).reshape(grad.shape), None


def newton_factor(matrices: Tensor, ridge: Tensor, planar: bool) -> Tensor:
    """`reference.polar` of real (..., m, n) or planar (..., 2, m, n) matrices; ridge (...)."""
    ridge = ridge[..., None, None]
    if not planar:
        return reference.polar(matrices, ridge=ridge)
    factors = reference.polar(torch.complex(*matrices.unbind(-3)), ridge=ridge)
    return torch.stack([factors.real, factors.imag], dim=-3)


def largest_singular_value(matrices: Tensor) -> Tensor:
    """Return a bound of the largest singular value of matrices (..., m, n), rounding included.

    Real or complex, float64 or complex128 for a proof.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mH
    m, n = matrices.shape[-2:]
    largest = torch.linalg.eigvalsh(matrices @ matrices.mH)[..., -1].clamp_min(0).amax()
    # the product and its eigenvalues are off by (n + m) eps times the squared Frobenius norm
    frobenius = torch.linalg.matrix_norm(matrices).square().amax()
    rounding = 8 * (m + n) * torch.finfo(largest.dtype).eps * frobenius
    return (largest + rounding).sqrt()


def half_spectrum_norm(kernel: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return the Frobenius norm of `torch.fft.rfft2(kernel, map_size)`, without the transform.

    By Parseval's identity, for the whole spectrum and for the columns that a real transform does
    not drop one of two equal copies of. The kernel, (out, in, kh, kw), must fit the map.
    """
    h, w = map_size
    whole = h * w * kernel.square().sum()
    own = h * kernel.sum(dim=-1).square().sum()
    if w % 2 == 0:
        signs = 1 - 2 * (torch.arange(kernel.shape[-1], device=kernel.device) % 2)
        own = own + h * (kernel * signs).sum(dim=-1).square().sum()
    return (0.5 * (whole + own)).sqrt()
