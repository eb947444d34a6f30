"""A lipfast network under Hugging Face Accelerate, in float32 or bf16 mixed precision.

Run it as it is, or with `accelerate launch` on several processes.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import digits, show
from torch.utils.data import DataLoader, TensorDataset

from lipfast.models import ConvNet
from lipfast.training import margin_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="aol")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    arguments = parser.parse_args()

    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    set_seed(0)
    train_set, test_set = digits()
    model = ConvNet(arguments.method, input_size=(1, 8, 8), width=8, size=None, layers_per_block=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    loader = DataLoader(TensorDataset(*train_set), batch_size=128, shuffle=True)
    steps = arguments.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    for _ in range(arguments.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(margin_cross_entropy(model(x), y))
            optimizer.step()
            schedule.step()

    # certified in float32: the autocast that prepare() wrapped around forward() goes
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if accelerator.is_main_process:
        show(f"accelerate, {arguments.method}, {arguments.mixed_precision}", network, *test_set)


if __name__ == "__main__":
    main()
