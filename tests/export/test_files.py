"""Files of plain networks: the same scores without lipfast and in onnxruntime, the certificate."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lipfast
from lipfast import nn as lnn
from lipfast.export import read_certificate, to_onnx, to_pt2, to_safetensors
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)


def network(method: str) -> ConvNet:
    torch.manual_seed(0)
    net = ConvNet(method, width=8, input_size=(3, 4, 4), layers_per_block=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with every method's network in each format but ONNX."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    x = torch.randn(3, 3, 4, 4)
    torch.save(x, folder / "x.pt")
    for method in METHODS:
        net = network(method)
        plain = lipfast.to_plain(net)
        to_pt2(plain, folder / f"{method}.pt2")
        to_safetensors(plain, folder / f"{method}.safetensors")
        zeroed = {name: torch.zeros_like(value) for name, value in plain.state_dict().items()}
        torch.save(net(x).detach(), folder / f"{method}.scores")
        plain.load_state_dict(zeroed)
        torch.save(plain, folder / f"{method}.architecture")
    return folder


WITHOUT_LIPFAST = """
import json, sys
sys.modules["lipfast"] = None
import torch
from safetensors.torch import load_file
folder, *methods = sys.argv[1:]
x = torch.load(f"{folder}/x.pt")
result = {}
for method in methods:
    expected = torch.load(f"{folder}/{method}.scores")
    program = torch.export.load(f"{folder}/{method}.pt2").module()
    plain = torch.load(f"{folder}/{method}.architecture", weights_only=False)
    plain.load_state_dict(load_file(f"{folder}/{method}.safetensors"))
    outputs = [program(x), torch.cat([program(x[:1]), program(x[1:])]), plain(x)]
    bound = plain.certificate["lipschitz_bound"]
    result[method] = [bound, *(float((y - expected).norm() / expected.norm()) for y in outputs)]
assert not any(name.startswith("lipfast.") for name in sys.modules)
print(json.dumps(result))
"""


@pytest.mark.slow
def test_files_run_without_lipfast(exported):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_LIPFAST, str(exported), *METHODS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=exported)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == set(METHODS)
    for method, (bound, *errors) in result.items():
        assert 0.9 < bound < 1 + 1e-5, method
        assert max(errors) < 1e-5, method


@pytest.mark.parametrize("method", METHODS)
def test_certificates_are_read_from_both_files(exported, method):
    certificate = lipfast.to_plain(network(method)).certificate
    assert read_certificate(exported / f"{method}.pt2") == certificate
    assert read_certificate(str(exported / f"{method}.safetensors")) == certificate
    assert certificate["input_size"] == [3, 4, 4]
    assert certificate["lipfast_version"] == lipfast.__version__


@pytest.mark.parametrize("method", METHODS)
def test_onnxruntime_gives_the_same_scores(tmp_path, method):
    net = network(method)
    path = tmp_path / "net.onnx"
    to_onnx(net, path)
    session = onnxruntime.InferenceSession(path)
    for n in (1, 3):
        x = torch.randn(n, 3, 4, 4)
        (y,) = session.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(y, net(x).detach().numpy(), rtol=0, atol=1e-5)
    assert read_certificate(path) == lipfast.to_plain(net).certificate
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def test_onnx_of_fourier_transforms(tmp_path):
    """The ways to compute them that a map of 4 x 4 with 8 channels does not take."""
    torch.manual_seed(0)
    model = nn.Sequential(lnn.CayleyConv2d(3, 16, 3), nn.AvgPool2d(4), lnn.CayleyConv2d(16, 32, 3))
    plain = lipfast.to_plain(model.eval(), (3, 16, 16))
    kinds = {type(module).__name__ for module in plain.modules()}
    assert {"_Direct", "_Separable"} <= kinds
    to_onnx(plain, tmp_path / "net.onnx")
    x = torch.randn(2, 3, 16, 16)
    (y,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=0, atol=1e-5)
    operators = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert "MatMul" in operators
    assert not {"DFT", "Einsum", "Loop", "If"} & operators


def test_onnx_of_an_odd_number_of_channels_and_an_older_opset(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(lnn.AOLConv2d(3, 5, 3, padding_mode="zeros"), lnn.MaxMin()).eval()
    path = tmp_path / "net.onnx"
    to_onnx(model, path, (3, 4, 6), opset=18)
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [18]
    x = torch.randn(2, 3, 4, 6)
    (y,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=0, atol=1e-5)


def test_an_opset_that_torch_cannot_write_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="opset: torch writes this network in version 18, not in 9"
    ):
        to_onnx(lnn.AOLConv2d(2, 2, 3), tmp_path / "net.onnx", (2, 4, 4), opset=9)
    assert not list(tmp_path.iterdir())


def test_a_large_onnx_keeps_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lipfast.export.files._ONNX_LIMIT", 1000)
    layer = lnn.AOLLinear(32, 32).eval()
    to_onnx(layer, tmp_path / "layer.onnx", (32,))
    assert {entry.name for entry in tmp_path.iterdir()} == {"layer.onnx", "layer.onnx.data"}
    x = torch.randn(2, 32)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    (y,) = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(y, layer(x).detach().numpy(), rtol=0, atol=1e-5)
    assert read_certificate(tmp_path / "layer.onnx")["lipschitz_bound"] <= 1 + 1e-6


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ImportError, match=r"needs onnxscript: .*lipfast\[export\]"):
        to_onnx(lnn.AOLLinear(3, 3), tmp_path / "net.onnx", (3,))
    assert not list(tmp_path.iterdir())


def test_weights_that_changed_are_not_exported_with_the_certificate(tmp_path):
    plain = lipfast.to_plain(lnn.AOLLinear(3, 3), (3,))
    plain.weight[0, 0] += 1
    for write, suffix in ((to_onnx, "onnx"), (to_pt2, "pt2"), (to_safetensors, "safetensors")):
        with pytest.raises(ValueError, match="certificate does not hold"):
            write(plain, tmp_path / f"net.{suffix}")
    for change in (nn.Module.half, nn.Module.double):
        with pytest.raises(ValueError, match="trained, loaded or cast"):
            to_pt2(change(lipfast.to_plain(lnn.AOLLinear(3, 3), (3,))), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_shared_layers_are_saved_under_each_name(tmp_path):
    layer = lnn.BCOPConv2d(4, 4, 3)
    plain = lipfast.to_plain(nn.Sequential(layer, lnn.MaxMin(), layer), (4, 5, 5))
    to_safetensors(plain, tmp_path / "net.safetensors")
    state = load_file(tmp_path / "net.safetensors")
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_bad_paths_and_sizes(tmp_path):
    layer = lnn.AOLLinear(3, 3)
    for write, suffix in ((to_onnx, "onnx"), (to_pt2, "pt2"), (to_safetensors, "safetensors")):
        with pytest.raises(ValueError, match=rf"path: expected a name that ends in \.{suffix}"):
            write(layer, tmp_path / "net.bin", (3,))
    for write, suffix in ((to_onnx, "onnx"), (to_pt2, "pt2")):
        with pytest.raises(ValueError, match=r"input_size: expected the sizes of one input"):
            write(layer, tmp_path / f"net.{suffix}")
    with pytest.raises(ValueError, match=r"input_size: expected \[3\], .* got \[4\]"):
        to_pt2(lipfast.to_plain(layer, (3,)), tmp_path / "net.pt2", (4,))
    with pytest.raises(FileNotFoundError, match="path: expected a file"):
        read_certificate(tmp_path / "none.onnx")
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"path: expected \.onnx, \.pt2 or \.safetensors"):
        read_certificate(tmp_path / "net.bin")
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a certificate of lipfast"):
        read_certificate(tmp_path / "other.safetensors")
    metadata = {"lipfast.certificate": "{}"}
    save_file({"w": torch.zeros(1)}, tmp_path / "empty.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"certificate: expected the keys .*lipschitz_bound"):
        read_certificate(tmp_path / "empty.safetensors")
