"""attar inside your own training loop: any model, any loader, any optimiser.

python examples/user_loop.py --epochs 3
"""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import attar


def digits() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).repeat(1, 3, 4, 4) / 8 - 1
    labels = torch.tensor(labels)
    return TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", default="mobilenetv3_small_050")
    epochs, model = vars(parser.parse_args()).values()
    torch.manual_seed(0)
    train, test = digits()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    student = timm.create_model(model, num_classes=10)  # any nn.Module
    distiller = attar.Distiller(student, [attar.methods.ONE(branches=3)], task=attar.Classification(10))
    distiller.build(next(iter(loader))[0])  # probes shapes once, makes auxiliaries
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    steps = epochs * len(loader)
    progress = torch.zeros(())
    for epoch in range(epochs):
        distiller.train()
        for step, batch in enumerate(loader):
            progress.fill_((epoch * len(loader) + step) / steps)
            terms = distiller(batch, progress)
            terms.total().backward()
            optimizer.step()
            optimizer.zero_grad()
        named = ", ".join(f"{name} {loss.item():.3f}" for name, loss in terms.losses.items())
        print(f"epoch {epoch + 1}: {named}")

    plain = distiller.strip()  # the original class, the original keys, proved
    with torch.no_grad():
        images, labels = test.tensors
        accuracy = (plain(images).argmax(1) == labels).float().mean()
    torch.save(plain.state_dict(), "student.pt")
    fresh = timm.create_model(model, num_classes=10)
    fresh.load_state_dict(torch.load("student.pt", weights_only=True))
    print(f"{type(plain).__name__}: accuracy {accuracy:.3f}, loads into a fresh timm model")


if __name__ == "__main__":
    main()
