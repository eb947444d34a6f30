"""AOL and BCOP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lipfast import reference


class AOLConv2DRescaling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * reference.aol_rescale(weight)[:, None, None]


class AOLConv2d(nn.Conv2d):
    def __init__(self, in_channels, out_channels, kernel_size, initializer=None, **kwargs):
        padding = {"padding": "same", "padding_mode": "circular"}
        super().__init__(in_channels, out_channels, kernel_size, **{**padding, **kwargs})
        (initializer or nn.init.dirac_)(self.weight)
        nn.init.zeros_(self.bias)
        register_parametrization(self, "weight", AOLConv2DRescaling())


def bjorck_steps(matrix: Tensor, steps: int, scaled: bool) -> Tensor:
    """Steps on the matrices divided by a power iteration of ten steps from a random vector."""
    if matrix.shape[-2] < matrix.shape[-1]:
        return bjorck_steps(matrix.mT, steps, scaled).mT
    if scaled:
        with torch.no_grad():
            u = torch.randn(*matrix.shape[:-1], 1, dtype=matrix.dtype, device=matrix.device)
            for _ in range(10):
                v = F.normalize(matrix.mT @ u, dim=-2)
                u = F.normalize(matrix @ v, dim=-2)
            norm = u.mT @ matrix @ v
        matrix = matrix / norm
    for _ in range(steps):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.mT @ matrix)
    return matrix


Blocks = dict[tuple[int, int], Tensor]


def _block(p: Tensor, q: Tensor) -> Blocks:
    identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
    rows, columns = (p, identity - p), (q, identity - q)
    return {(i, j): rows[i] @ columns[j] for i in range(2) for j in range(2)}


def _block_product(first: Blocks, second: Blocks) -> Blocks:
    product: Blocks = {}
    for (i, j), left in first.items():
        for (a, b), right in second.items():
            product[i + a, j + b] = product.get((i + a, j + b), 0) + left @ right
    return product


class BCOP(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, bias=True, bjorck_iters=20):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, 1
        self.max_channels = c = max(in_channels, out_channels)
        self.num_kernels = count = 2 * kernel_size - 1
        self.bjorck_iters, self.power_iteration_scaling, self.frozen = bjorck_iters, True, False
        matrices = torch.stack([nn.init.orthogonal_(torch.empty(c, c)) for _ in range(count)])
        self.param_matrices = nn.Parameter(matrices / math.sqrt(c))
        half = (torch.arange(c) < c // 2).float().expand(count - 1, 1, c).clone()
        self.mask = nn.Parameter(half, requires_grad=False)
        self.enable_bias = bias
        limit = 1 / math.sqrt(out_channels)
        start = torch.empty(out_channels).uniform_(-limit, limit)
        self.bias = nn.Parameter(start) if bias else None
        self.weight = None

    def update_weight(self):
        matrices = bjorck_steps(self.param_matrices, self.bjorck_iters, True)
        factor = matrices[0, : self.in_channels, : self.out_channels]
        columns = matrices[1:] * self.mask
        projectors = columns @ columns.mT
        more_inputs = self.in_channels > self.out_channels
        if more_inputs:
            factor = factor.T
        if self.kernel_size == 1:
            self.weight = factor[:, :, None, None]
            return
        pairs = [_block(p, q) for p, q in zip(projectors[::2], projectors[1::2], strict=True)]
        blocks = pairs[0]
        for following in pairs[1:]:
            blocks = _block_product(blocks, following)
        blocks = {key: factor @ block for key, block in blocks.items()}
        sides = range(self.kernel_size)
        stacked = torch.stack([torch.stack([blocks[i, j] for j in sides]) for i in sides])
        self.weight = stacked.permute((2, 3, 1, 0) if more_inputs else (3, 2, 1, 0))

    def forward(self, x):
        if self.training:
            self.update_weight()
        elif self.weight is None:
            with torch.no_grad():
                self.update_weight()
        x = F.pad(x, 4 * [self.kernel_size // 2], mode="circular")
        return F.conv2d(x, self.weight, self.bias)
