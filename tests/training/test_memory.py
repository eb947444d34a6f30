import torch
from torch import nn

from lipfast.training import saved_for_backward_bytes

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


class Square(torch.autograd.Function):
    """Saves its input and nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squares(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        x = self.linear(x)
        for _ in range(self.n):
            x = Square.apply(x)
        return x


def test_each_saved_activation_counts_once():
    one, four = (
        saved_for_backward_bytes(Squares(1), X, Y),
        saved_for_backward_bytes(Squares(4), X, Y),
    )
    assert four - one == 3 * 4 * 3 * 4  # three more activations of shape (4, 3) in float32


def test_a_storage_that_is_saved_twice_counts_once():
    class Twice(Squares):
        def forward(self, x):
            x = self.linear(x)
            return Square.apply(x) + Square.apply(x)

    assert saved_for_backward_bytes(Twice(0), X, Y) == saved_for_backward_bytes(Squares(1), X, Y)


def test_parameters_do_not_count():
    # The weight is saved for the gradient of the input of the second layer.
    model = nn.Sequential(nn.Linear(6, 1000, bias=False), nn.Linear(1000, 3, bias=False))
    assert saved_for_backward_bytes(model, X, Y) < 4 * 1000 * 3 + 4 * 4 * 1000


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved_for_backward_bytes(model, X, Y)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
