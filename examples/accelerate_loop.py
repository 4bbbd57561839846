"""attar under a Hugging Face Accelerate loop: prepare the distiller like any model.

accelerate launch examples/accelerate_loop.py --epochs 2
ACCELERATE_USE_CPU=true torchrun --nproc-per-node=2 examples/accelerate_loop.py   # two processes without a GPU
"""

from __future__ import annotations

import argparse

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import attar
import attar.zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    accelerator = Accelerator()
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 8 - 1
    data = TensorDataset(images, torch.tensor(labels))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)

    student = timm.create_model("cifar_resnet20", num_classes=10, width=0.5)
    methods = [attar.methods.ONE(branches=2), attar.methods.Supervised(label_smoothing=0.1)]
    distiller = attar.Distiller(student, methods, attar.Classification(10)).build(images[:8])
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    step_of, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)

    steps = epochs * len(loader)
    progress = torch.zeros((), device=accelerator.device)
    for epoch in range(epochs):
        step_of.train()
        for step, batch in enumerate(loader):
            progress.fill_((epoch * len(loader) + step) / steps)
            terms = step_of(batch, progress)
            accelerator.backward(terms.total())
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: total {terms.total().item():.3f}")

    plain = accelerator.unwrap_model(step_of).strip()
    size = sum(parameter.numel() for parameter in plain.parameters())
    accelerator.print(
        f"{type(plain).__name__}, {size:,} parameters, trained by {accelerator.num_processes} process(es)"
    )


if __name__ == "__main__":
    main()
