"""CPL, SLL, SOC and MaxMin."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import reference


class CPLConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, val_niter=100, **kwargs):
        super().__init__()
        self.activation = nn.ReLU(inplace=False)
        self.val_niter = val_niter
        self.kernel = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _start(self)
        self.u_initialized = False
        self.padding, self.epsilon, self.val_rescaling_cached = "same", 1e-6, None

    @property
    def tp_padding(self):
        return (self.kernel.shape[-1] - 1) // 2

    @torch.no_grad()
    def update_uv(self, steps, epsilon):
        u = self.u
        for _ in range(steps):
            v = F.conv2d(u, self.kernel, padding="same")
            v = v / (v.norm() + epsilon)
            u = F.conv_transpose2d(v, self.kernel, padding=self.tp_padding)
            u = u / (u.norm() + epsilon)
        return u, v

    def calculate_rescaling(self, u, v):
        product = (F.conv2d(u, self.kernel, padding="same") * v).sum()
        return 2 / (product**2 + self.epsilon)

    def forward(self, x):
        hidden = self.activation(F.conv2d(x, self.kernel, self.bias, padding=self.padding))
        hidden = F.conv_transpose2d(hidden, self.kernel, padding=self.tp_padding)
        if not self.u_initialized:
            shape = (1, self.kernel.shape[0], *x.shape[-2:])
            self.register_buffer("u", torch.randn(shape, dtype=x.dtype, device=x.device))
            self.u_initialized = True
        if self.training:
            self.val_rescaling_cached = None
            self.u, v = self.update_uv(1, self.epsilon)
            return x - self.calculate_rescaling(self.u, v) * hidden
        if self.val_rescaling_cached is None:
            self.val_rescaling_cached = self.calculate_rescaling(
                *self.update_uv(self.val_niter, 1e-12)
            )
        return x - self.val_rescaling_cached * hidden


class SLLConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, padding="same", **kwargs):
        super().__init__()
        self.activation = nn.ReLU(inplace=False)
        self.kernel = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.q = nn.Parameter(torch.randn(out_channels))
        _start(self)
        self.padding, self.epsilon, self.val_rescaling_cached = padding, 1e-6, None

    def get_rescaling(self):
        products = F.conv2d(self.kernel, self.kernel, padding=self.kernel.shape[-1] - 1)
        q = self.q.abs() + self.epsilon
        bound = (products * q[None, :, None, None]).abs().sum((1, 2, 3)) / q
        return 2 / (bound + self.epsilon)

    def forward(self, x):
        hidden = self.activation(F.conv2d(x, self.kernel, self.bias, padding=self.padding))
        if self.training:
            self.val_rescaling_cached = None
            rescaling = self.get_rescaling()
        else:
            if self.val_rescaling_cached is None:
                self.val_rescaling_cached = self.get_rescaling()
            rescaling = self.val_rescaling_cached
        padding = (self.kernel.shape[-1] - 1) // 2
        hidden = rescaling[:, None, None] * hidden
        return x - F.conv_transpose2d(hidden, self.kernel, padding=padding)


def _start(layer: nn.Module) -> None:
    nn.init.xavier_normal_(layer.kernel)
    limit = 1 / math.sqrt(layer.kernel[0].numel())
    nn.init.uniform_(layer.bias, -limit, limit)


class SOC(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        padding=None,
        bias=True,
        train_terms=5,
        eval_terms=12,
        init_iters=50,
        update_iters=1,
        update_freq=200,
        correction=0.7,
    ):
        super().__init__()
        self.init_iters, self.update_iters, self.update_freq = init_iters, update_iters, update_freq
        self.out_channels, self.in_channels = out_channels, in_channels * stride**2
        self.max_channels = c = max(out_channels, self.in_channels)
        self.stride, self.kernel_size, self.total_iters = stride, kernel_size, 0
        self.train_terms, self.eval_terms, self.enable_bias = train_terms, eval_terms, bias
        k = kernel_size
        self.random_conv_filter = nn.Parameter(torch.randn(c, c, k, k))
        shapes = [
            ((1, c, 1, k), (c, 1, k, 1)),
            ((1, c, k, 1), (c, 1, 1, k)),
            ((1, c, k, k), (c, 1, 1, 1)),
            ((c, 1, k, k), (1, c, 1, 1)),
        ]
        for index, (right, left) in enumerate(shapes, start=1):
            for name, shape in (("u", right), ("v", left)):
                vector = nn.Parameter(_unit(torch.randn(shape)), requires_grad=False)
                setattr(self, f"{name}{index}", vector)
        self._power_iteration(reference.skew_kernel(self.random_conv_filter), init_iters)
        value = torch.tensor([1.0 if k == 1 else correction])
        self.correction = nn.Parameter(value, requires_grad=False)
        nn.init.normal_(self.random_conv_filter, std=1 / math.sqrt(c))
        limit = 1 / math.sqrt(out_channels)
        start = torch.empty(out_channels).uniform_(-limit, limit)
        self.bias = nn.Parameter(start) if bias else None

    @torch.no_grad()
    def _power_iteration(self, kernel, steps):
        sums = [((1, 3), (0, 2)), ((1, 2), (0, 3)), ((1, 2, 3), (0,)), ((0, 2, 3), (1,))]
        for _ in range(steps):
            for index, (right, left) in enumerate(sums, start=1):
                u, v = getattr(self, f"u{index}"), getattr(self, f"v{index}")
                v.data = _unit((kernel * u).sum(right, keepdim=True)).data
                u.data = _unit((kernel * v).sum(left, keepdim=True)).data

    def update_sigma(self):
        kernel = reference.skew_kernel(self.random_conv_filter)
        if self.training:
            fresh = self.total_iters % self.update_freq == 0
            self._power_iteration(kernel, self.init_iters if fresh else self.update_iters)
            self.total_iters += 1
        pairs = [(self.u1, self.v1), (self.u2, self.v2), (self.u3, self.v3), (self.u4, self.v4)]
        first, *others = [(kernel * u * v).sum() for u, v in pairs]
        for sigma in others:
            first = torch.min(first, sigma)
        return first

    def forward(self, x):
        sigma = self.update_sigma()
        kernel = self.correction * reference.skew_kernel(self.random_conv_filter) / sigma
        x = F.pixel_unshuffle(x, self.stride)
        z = F.pad(x, (0, 0, 0, 0, 0, max(0, self.out_channels - self.in_channels)))
        terms = self.train_terms if self.training else self.eval_terms
        z = reference.skew_exp(z, kernel, terms, "zeros")[:, : self.out_channels]
        return z if self.bias is None else z + self.bias[:, None, None]


def _unit(vector: Tensor) -> Tensor:
    """Waits for the number on the host, as published."""
    return vector / max(float(vector.norm()), 1e-12)


class MaxMin(nn.Module):
    def forward(self, x):
        if x.shape[1] % 2:
            return self.forward(F.pad(x, (0, 0, 0, 0, 0, 1), value=-math.inf))[:, :-1]
        pairs = x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:])
        largest = torch.max(pairs, dim=2, keepdim=True)[0]
        smallest = torch.min(pairs, dim=2, keepdim=True)[0]
        return torch.cat((largest, smallest), dim=2).view(x.shape)
