import pytest
import torch

from lipfast.data import AUGMENTATIONS, NAMES
from lipfast.models import ConvNet
from lipfast.nn import METHODS
from lipfast.training import TrainConfig, recipe


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", NAMES)
def test_every_recipe_is_valid(dataset, method):
    chosen = recipe(dataset, method)
    TrainConfig(
        epochs=chosen["epochs"],
        lr=chosen["lr"],
        weight_decay=chosen["weight_decay"],
        batch_size=chosen["batch_size"],
    )
    assert chosen["augment"] is None or chosen["augment"] in AUGMENTATIONS


@pytest.mark.parametrize("dataset", NAMES)
def test_network_takes_the_images(dataset):
    arguments = recipe(dataset, "aol")["model"]
    model = ConvNet("aol", **arguments)
    assert model(torch.zeros(1, *arguments["input_size"])).shape == (1, arguments["n_classes"])


def test_recipes_are_independent_copies():
    recipe("digits", "aol")["model"]["width"] = 2
    assert recipe("digits", "aol")["model"]["width"] == 16


@pytest.mark.parametrize(("dataset", "method"), [("mnist", "aol"), ("digits", "AOL")])
def test_rejects(dataset, method):
    wrong = (
        f"dataset must be .* got '{dataset}'" if dataset == "mnist" else "method must be .*'AOL'"
    )
    with pytest.raises(ValueError, match=wrong):
        recipe(dataset, method)
