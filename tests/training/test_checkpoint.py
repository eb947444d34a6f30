import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lipfast.models import ConvNet
from lipfast.training import Checkpoint, load_checkpoint, load_model, save_checkpoint

ARGUMENTS = {"size": None, "width": 4, "input_size": (1, 4, 4), "n_classes": 3}


def make_checkpoint(**metadata):
    shared = torch.arange(6.0).view(2, 3)
    model = {
        "weight": shared,
        "transposed": shared.t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }
    return Checkpoint(model, {"weight": -shared}, {"epoch": 2, "losses": [0.1, 1 / 3], **metadata})


def test_round_trip(tmp_path):
    checkpoint = make_checkpoint()
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    for ours, theirs in ((checkpoint.model, loaded.model), (checkpoint.momentum, loaded.momentum)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert theirs[name].dtype == tensor.dtype
            assert torch.equal(theirs[name], tensor)
    assert loaded.metadata == checkpoint.metadata
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make_checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a.safetensors is truncated or not a safetensors file"):
        load_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*a\.safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_foreign_files(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by lipfast"):
        load_checkpoint(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"lipfast": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="unknown format"):
        load_checkpoint(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_checkpoint(path)


def test_what_cannot_be_stored_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match=r"model.extra must be a tensor, got dict"):
        save_checkpoint(path, Checkpoint({"extra": {}}, {}, {}))
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(path, make_checkpoint(model=object()))
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(path, make_checkpoint(loss=float("nan")))
    assert not path.exists()


@pytest.mark.parametrize("method", ["aol", "soc"])
def test_load_model(tmp_path, method):
    torch.manual_seed(0)
    model = ConvNet(method, **ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, Checkpoint(model.state_dict(), {}, {"model": model.config, "epoch": 4}))
    loaded, metadata = load_model(path)
    assert not loaded.training
    assert metadata["model"]["method"] == method
    assert metadata["epoch"] == 4
    x = torch.rand(5, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


def test_load_model_keeps_the_options_of_the_layers(tmp_path):
    torch.manual_seed(0)
    options = {"series": "taylor", "norm": "unfolding", "terms": 4}
    model = ConvNet("soc", **ARGUMENTS, **options)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, Checkpoint(model.state_dict(), {}, {"model": model.config}))
    loaded, _ = load_model(path)
    assert {name: getattr(loaded.linear, name) for name in options} == options
    x = torch.rand(5, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


def test_load_model_rejects(tmp_path):
    path = tmp_path / "a.safetensors"
    linear = nn.Linear(2, 2)
    save_checkpoint(path, Checkpoint(linear.state_dict(), {}, {"model": None}))
    with pytest.raises(ValueError, match=r"no checkpoint of a lipfast\.models\.ConvNet"):
        load_model(path)
    config = ConvNet("aol", **ARGUMENTS).config
    save_checkpoint(path, Checkpoint(linear.state_dict(), {}, {"model": config}))
    with pytest.raises(ValueError, match=r"does not fit the model, .* the checkpoint none"):
        load_model(path)
