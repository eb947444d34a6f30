"""How the published layers store what ours do, method by method."""

import torch
from torch import Tensor

from lipfast.nn import LipschitzModule
from lipfast.reference import skew_kernel

from .published_base import Layout, Place, State

_POWER_STEPS = 200


class _Plain(Layout):
    """The same tensors under other names."""

    def __init__(self, **names: str) -> None:
        self.names = names

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        c, k = layer.out_channels, layer.kernel_size[0]
        sizes = {"weight": (c, c, k, k), "q": (c,), "bias": (c,)}
        has_bias = layer.bias is not None
        return {
            theirs: sizes[own] for own, theirs in self.names.items() if own != "bias" or has_bias
        }

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        return {own: found[theirs] for own, theirs in self.names.items() if theirs in found}

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        return {theirs: own[name] for name, theirs in self.names.items() if name in own}


class _Cayley(_Plain):
    """Alpha multiplies weight / norm, and theirs takes the norm of half of the spectrum."""

    optional = ("alpha",)

    def __init__(self, linear: bool) -> None:
        super().__init__(weight="weight", bias="bias")
        self.linear = linear

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(layer, place)
        if self.linear:
            return {**shapes, "weight": shapes["weight"][:2], "alpha": (1,)}
        return {**shapes, "alpha": ()}

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        norm, theirs = self._norms(found["weight"], place)
        alpha = found.get("alpha", theirs) * (norm / theirs)
        return {**super().ours(found, layer, place), "alpha": alpha}

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        norm, theirs = self._norms(own["weight"], place)
        alpha = own["alpha"] * (theirs / norm)
        return {**super().published(own, layer, place), "alpha": alpha}

    def _norms(self, weight: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(weight)
        if self.linear:
            return norm, norm
        kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
        side = (place.map_size, place.map_size)
        return norm, torch.linalg.vector_norm(torch.fft.rfft2(kernel, side))


class _Bcop(Layout):
    """Theirs composes the transposed kernel: K^T = H B(P_1, Q_1) ... B(P_n, Q_n).

    With H orthogonal, K = H^T (H Q_n H^T) (H P_n H^T) ... (H P_1 H^T) in our order, and a projector
    R R^T becomes (H R) (H R)^T. 1x1 kernels are H itself in both.
    """

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        c, count = layer.out_channels, 2 * layer.kernel_size[0] - 1
        bias = {} if layer.bias is None else {"bias": (c,)}
        return {"param_matrices": (count, c, c), "mask": (count - 1, 1, c), **bias}

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        mask, matrices = found.pop("mask"), found.pop("param_matrices")
        if not torch.equal(mask, _mask(layer)):
            raise ValueError(
                f"state_dict: {place.name}.mask is not that of half of the columns, the one that "
                "the published code makes"
            )
        return {**found, "weight": _reordered(matrices)}

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        weight = own.pop("weight")
        matrices = weight if weight.dim() == 3 else weight[None]
        mask = _mask(layer)
        return {**own, "param_matrices": _reordered(matrices), "mask": mask}


def _mask(layer: LipschitzModule) -> Tensor:
    c = layer.out_channels
    half = (torch.arange(c) < c // 2).to(torch.float64)
    return half.expand(2 * layer.kernel_size[0] - 2, 1, c).clone()


def _reordered(matrices: Tensor) -> Tensor:
    """Change between the two orders: an involution up to factors that do not matter."""
    if len(matrices) == 1:
        return matrices
    left, _, right = torch.linalg.svd(matrices[0])
    return torch.cat([matrices[:1].mT, (left @ right) @ matrices[1:].flip(0)])


class _Cpl(_Plain):
    """The vector of the power iteration lives on the whole map, ours on a patch of it."""

    optional = ("u",)

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        u = (1, layer.out_channels, place.map_size, place.map_size)
        return {**super().shapes(layer, place), "u": u}

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        state = super().ours(found, layer, place)
        if "u" not in found:
            return state
        u = found["u"]
        vector = layer.get_buffer("power_vector").detach().to("cpu", torch.float64).clone()
        side = min(place.map_size, vector.shape[-1])
        if vector.shape[-1] == 1:  # of the matrix: every pixel has it, up to a factor
            pixels = u.flatten(2)[0]
            vector = pixels[:, pixels.norm(dim=0).argmax()].reshape(vector.shape)
        else:
            vector[..., :side, :side] = u[..., :side, :side]
        return {**state, "power_vector": vector}

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        vector, side = own["power_vector"], place.map_size
        if vector.shape[-1] == 1:
            u = vector.expand(-1, -1, side, side)
        else:
            u = torch.zeros(*vector.shape[:2], side, side, dtype=vector.dtype)
            patch = min(side, vector.shape[-1])
            u[..., :patch, :patch] = vector[..., :patch, :patch]
        u = u / u.norm().clamp_min(1e-30)
        return {**super().published(own, layer, place), "u": u}


class _Soc(_Plain):
    """A constant, and power vectors of four unfoldings, which ours does not need."""

    optional = tuple(f"{side}{i}" for i in range(1, 5) for side in "uv")

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        c, k = layer.out_channels, layer.kernel_size[0]
        vectors = {
            **{"u1": (1, c, 1, k), "v1": (c, 1, k, 1), "u2": (1, c, k, 1), "v2": (c, 1, 1, k)},
            **{"u3": (1, c, k, k), "v3": (c, 1, 1, 1), "u4": (c, 1, k, k), "v4": (1, c, 1, 1)},
        }
        return {**super().shapes(layer, place), "correction": (1,), **vectors}

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        expected, correction = _correction(layer), float(found["correction"])
        if abs(correction - expected) > 1e-6:
            raise ValueError(
                f"state_dict: expected {place.name}.correction to be {expected}, got {correction:g}"
            )
        return super().ours(found, layer, place)

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        weight = own["weight"]
        kernel = 0.5 * skew_kernel(weight if weight.dim() == 4 else weight[:, :, None, None])
        vectors = {}
        for i, axes in enumerate([(0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 2, 3), (1, 0, 2, 3)], 1):
            rows = 1 if i > 2 else 2
            matrix = kernel.permute(axes).flatten(rows).flatten(0, rows - 1)
            u, v = _singular_vectors(matrix)
            vectors[f"u{i}"], vectors[f"v{i}"] = u, v
        correction = torch.tensor([_correction(layer)])
        return {**super().published(own, layer, place), "correction": correction, **vectors}

    def finish(self, layer: LipschitzModule) -> None:
        if "power_vector" not in layer._buffers:
            return
        with torch.no_grad():
            for _ in range(_POWER_STEPS // 10):
                layer.training_weights((1, 1))  # writes the vectors


def _correction(layer: LipschitzModule) -> float:
    return 1.0 if layer.kernel_size == (1, 1) else 0.7


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Right and left vector of the largest singular value, nearly, by power iteration."""
    v = torch.arange(1.0, len(matrix) + 1, dtype=matrix.dtype).cos()
    for _ in range(_POWER_STEPS):
        u = torch.nn.functional.normalize(matrix.mT @ v, dim=0)
        v = torch.nn.functional.normalize(matrix @ u, dim=0)
    return u, v


LAYOUTS: dict[str, Layout] = {
    "aol": _Plain(weight="parametrizations.weight.original", bias="bias"),
    "bcop": _Bcop(),
    "cayley": _Cayley(linear=False),
    "cpl": _Cpl(weight="kernel", bias="bias"),
    "lot": _Plain(weight="weight", bias="bias"),
    "sll": _Plain(weight="kernel", bias="bias", q="q"),
    "soc": _Soc(weight="random_conv_filter", bias="bias"),
}


class _Bjorck(_Plain):
    """The polar factor does not depend on the scale, but their steps diverge above norm sqrt(3)."""

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        norm = torch.linalg.matrix_norm(own["weight"], 2)
        return super().published({**own, "weight": own["weight"] / norm.clamp_min(1)}, layer, place)

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(layer, place)
        return {key: shape[:2] for key, shape in shapes.items()}


_LINEAR: dict[str, Layout] = {
    "bcop": _Bjorck(weight="weight", bias="bias"),
    "cayley": _Cayley(linear=True),
}


def linear_layout(method: str) -> Layout | None:
    """Return how the published network stores a linear head, None where it has none."""
    return _LINEAR.get(method)
