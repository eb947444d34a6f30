"""Linear layers: Cayley and Bjorck."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lipfast import reference

from .kernels import bjorck_steps


class CayleyLinear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        limit = 1 / in_features**0.5
        nn.init.uniform_(self.weight, -limit, limit)
        self.alpha = nn.Parameter(torch.full((1,), self.weight.norm().item()))
        self.Q_cached = None

    def forward(self, x):
        if self.training or self.Q_cached is None:
            matrix = reference.cayley(self.alpha * self.weight / self.weight.norm())
            self.Q_cached = None if self.training else matrix.detach()
        else:
            matrix = self.Q_cached
        return F.linear(x, matrix, self.bias)


class Bjorck_and_Bowie(nn.Module):
    def __init__(self, bjorck_iters_train, bjorck_iters_eval):
        super().__init__()
        self.bjorck_beta, self.bjorck_order, self.bjorck_iters_scheduler = 0.5, 1, None
        self.bjorck_iters_train, self.bjorck_iters_eval = bjorck_iters_train, bjorck_iters_eval
        self.power_iteration_scaling = True

    def forward(self, weight: Tensor) -> Tensor:
        steps = self.bjorck_iters_train if self.training else self.bjorck_iters_eval
        return bjorck_steps(weight, steps, self.power_iteration_scaling)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return bjorck_steps(weight, self.bjorck_iters_eval, self.power_iteration_scaling)


class BjorckLinear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        nn.init.orthogonal_(self.weight)
        register_parametrization(self, "weight", Bjorck_and_Bowie(3, 15))


class BnBLinearRescale(nn.Module):
    def __init__(self, train_iterations, val_iterations):
        super().__init__()
        self.train_iterations, self.val_iterations = train_iterations, val_iterations
        self.kwargs = {}

    def forward(self, weight: Tensor) -> Tensor:
        steps = self.train_iterations if self.training else self.val_iterations
        return bjorck_steps(weight, steps, False)


class BnBLinear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, train_iterations=3, val_iterations=15):
        super().__init__(in_features, out_features, bias)
        nn.init.eye_(self.weight)
        self.rescale = BnBLinearRescale(train_iterations, val_iterations)
        self.val_cache = None

    def forward(self, x):
        if self.training:
            self.val_cache = None
            return F.linear(x, self.rescale(self.weight), self.bias)
        if self.val_cache is None:
            self.val_cache = self.rescale(self.weight)
        return F.linear(x, self.val_cache, self.bias)


class BnBLinearBCOP(BnBLinear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias, train_iterations=20, val_iterations=20)
