"""LOT and Cayley convolutions: complex transfer matrices, a shift matrix, no wrap-around."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import reference


def shift_matrix(n: int, shift: int, dtype: torch.dtype) -> Tensor:
    index = torch.arange(n, dtype=dtype)
    return torch.exp(2j * math.pi * shift / n * (index[:, None] + index))


class LOT(nn.Conv2d):
    def __init__(self, *args, iter_T=10, eval_iter_T=10, **kwargs):
        self.strd = kwargs.pop("stride", 1)
        super().__init__(args[0] * self.strd**2, *args[1:], **kwargs)
        self.iter_T, self.eval_iter_T, self.w_cached = iter_T, eval_iter_T, None
        if self.weight.shape[0] == self.weight.shape[1]:
            centre = self.kernel_size[0] // 2
            with torch.no_grad():
                self.weight.zero_()
                self.weight[:, :, centre, centre] = torch.eye(self.out_channels)
                if self.bias is not None:
                    self.bias.zero_()

    def calculate_wfft(self, n):
        shift = shift_matrix(n, -(self.kernel_size[0] - 1) // 2, self.weight.dtype)
        shift = shift.to(self.weight.device)
        spectrum = (shift * torch.fft.fft2(self.weight, (n, n)).conj()).flatten(2).permute(2, 0, 1)
        steps = self.iter_T if self.training else self.eval_iter_T
        return _newton(spectrum, steps)

    def forward(self, x):
        x = F.pixel_unshuffle(x, self.strd)
        pad = self.kernel_size[0] // 2
        x = F.pad(x, 4 * [pad])
        batch, channels, n, _ = x.shape
        x_hat = torch.fft.fft2(x).permute(2, 3, 1, 0).reshape(n * n, channels, batch)
        if self.training:
            self.w_cached = None
            w_hat = self.calculate_wfft(n)
        else:
            if self.w_cached is None:
                self.w_cached = self.calculate_wfft(n)
            w_hat = self.w_cached
        z_hat = (w_hat @ x_hat).reshape(n, n, self.out_channels, batch).permute(3, 2, 0, 1)
        z = torch.fft.ifft2(z_hat).real[:, :, pad : n - pad, pad : n - pad]
        return z if self.bias is None else z + self.bias[:, None, None]


def _newton(v: Tensor, steps: int) -> Tensor:
    """On V V^H, of the size of the outputs, however many inputs there are."""
    identity = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    s = v @ v.mH + 1e-4 * identity
    norm = torch.linalg.matrix_norm(s, keepdim=True) + 1e-4
    y, z = s / norm, identity.expand_as(s)
    for _ in range(steps):
        t = 0.5 * (3 * identity - z @ y)
        y, z = y @ t, t @ z
    return z @ v / norm.sqrt()


class CayleyConv(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("alpha", None)
        self.val_cache = None

    def get_weight_fft(self, n):
        spectrum = torch.fft.rfft2(self.weight, (n, n)).flatten(2).permute(2, 0, 1).conj()
        spectrum = self.shift_matrix * spectrum
        norm = spectrum.norm()
        if self.alpha is None:
            self.alpha = nn.Parameter(self.weight.new_tensor(norm.item()))
        return reference.cayley(self.alpha * spectrum / norm)

    def forward(self, x):
        batch, channels, n, _ = x.shape
        half = n // 2 + 1
        if not hasattr(self, "shift_matrix"):
            shift = shift_matrix(n, -((self.kernel_size[0] - 1) // 2), x.dtype)
            self.shift_matrix = shift[:, :half].reshape(n * half, 1, 1).to(x.device)
        if self.training:
            self.val_cache = None
            w_hat = self.get_weight_fft(n)
        else:
            if self.val_cache is None:
                self.val_cache = self.get_weight_fft(n)
            w_hat = self.val_cache
        x_hat = torch.fft.rfft2(x).permute(2, 3, 1, 0).reshape(n * half, channels, batch)
        y_hat = (w_hat @ x_hat).reshape(n, half, self.out_channels, batch)
        y = torch.fft.irfft2(y_hat.permute(3, 2, 0, 1))
        return y if self.bias is None else y + self.bias[:, None, None]
