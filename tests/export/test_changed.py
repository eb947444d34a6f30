"""A certificate does not survive what it does not hold for."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lipfast
from lipfast import nn as lnn
from lipfast.export import read_certificate, to_pt2, to_safetensors


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        return x * self.scale


def network():
    torch.manual_seed(0)
    return nn.Sequential(lnn.AOLLinear(6, 6), nn.LeakyReLU(0.1), Scaled(), nn.Dropout(0.9))


def slope(plain):
    plain[1].negative_slope = 50.0


def module(plain):
    plain[1] = nn.Hardswish()


def buffer(plain):
    plain[2].scale.fill_(9.0)


def hook(plain):
    plain[0].register_forward_hook(lambda module, args, output: 10 * output)


def hook_before(plain):
    plain[0].register_forward_pre_hook(lambda module, args: (10 * args[0],))


def forward(plain):
    own = plain[0].forward
    plain[0].forward = lambda x: 10 * own(x)


@pytest.mark.parametrize("change", [slope, module, buffer, hook, hook_before, forward])
def test_a_changed_network_is_refused(change, tmp_path):
    plain = lipfast.to_plain(network(), (6,))
    change(plain)
    with pytest.raises(ValueError, match="certificate does not hold"):
        to_safetensors(plain, tmp_path / "net.safetensors")


def test_files_are_of_evaluation_mode(tmp_path):
    plain = lipfast.to_plain(network(), (6,)).train()
    assert not any(m.training for m in lipfast.to_plain(plain).modules())
    assert plain.training
    to_pt2(plain, tmp_path / "net.pt2")
    found, x = torch.export.load(tmp_path / "net.pt2").module(), torch.randn(3, 6)
    torch.testing.assert_close(found(x), plain.eval()(x))


def test_a_file_with_other_weights_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    to_safetensors(network(), path, (6,))
    assert read_certificate(path)["lipschitz_bound"] <= 1
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({k: 7 * v for k, v in load_file(path).items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match="other weights"):
        read_certificate(path)


class Aside(nn.Module):
    """Calls the layers of its chain one by one, and uses what one of them drops."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(lnn.AOLConv2d(2, 8, 3, padding=1), lnn.FirstChannels(4))

    def forward(self, x):
        y = self.chain[0](x)
        return self.chain[1](y) + torch.relu(y - 30).mean(1, keepdim=True)


def test_channels_that_are_used_outside_of_the_chain_stay():
    torch.manual_seed(0)
    model = Aside().eval()
    nn.init.normal_(model.chain[0].weight)
    plain = lipfast.to_plain(model, (2, 8, 8))
    x = 1e4 * torch.randn(1, 2, 8, 8)  # the size that to_plain looks at is 1
    torch.testing.assert_close(plain(x), model(x).detach(), rtol=1e-4, atol=1e-2)


class Batch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = lnn.AOLLinear(4, 4)

    def forward(self, x):
        return self.layer(x) * x.shape[0]


def test_nothing_is_claimed_for_networks_of_one_size_of_batch():
    certificate = lipfast.to_plain(Batch(), (4,)).certificate
    assert certificate["lipschitz_bound"] is None
    assert "batch" in certificate["reason"]
