"""A lipfast network in a LightningModule."""

import argparse
import logging

import lightning
import torch
from common import digits, show
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lipfast.models import ConvNet
from lipfast.training import margin_cross_entropy


class Certified(lightning.LightningModule):
    def __init__(self, method: str, epochs: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = ConvNet(
            method, input_size=(1, 8, 8), width=8, size=None, layers_per_block=1, n_classes=10
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = margin_cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.2, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="aol")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--accelerator", default="cpu")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    train_set, test_set = digits()

    module = Certified(arguments.method, arguments.epochs)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*train_set), batch_size=128, shuffle=True))
    show(f"lightning, {arguments.method}", module.model, *test_set)


if __name__ == "__main__":
    main()
