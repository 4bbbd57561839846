"""What formats share that begin with torch.export: the program, silence, the operator to blame, batches of a file."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from attar.deploy.artefact import Images, Logits
from attar.deploy.candidate import first_line
from attar.errors import AttarError

__all__ = ["export_program", "in_batches", "refusal", "require", "silence"]

# How the exporters tell an operator: a schema's name, or the attribute of torch.ops.
_OPERATOR = re.compile(r"\b(aten|prims|torchvision|quantized_decomposed)(?:::|\.)(\w+)")


def require(packages: tuple[str, ...], format_name: str, extra: str) -> None:
    """Import what a format needs.

    Raises:
        AttarError: a package is missing; the sentence has the command that installs it.
    """
    for package in packages:
        try:
            with silence():
                importlib.import_module(package)
        except ImportError as error:
            missing = package.partition(".")[0]
            raise AttarError(f'{format_name} needs the package {missing}: pip install "attar[{extra}]".') from error


def export_program(network: nn.Module, images: torch.Tensor, most: int | None, format_name: str) -> Any:
    """Return what torch.export makes of a network in evaluation mode.

    Args:
        network: images [N, 3, H, W] -> logits [N, K].
        images: example [N, 3, H, W].
        most: images at a time, any number up to this; None: always N.
        format_name: what refuses the network.

    Raises:
        AttarError: torch.export refuses the network; the sentence has the operator, or the reason.
    """
    shapes = None if most is None else ({0: torch.export.Dim("batch", min=1, max=most)},)
    with silence():
        try:
            return torch.export.export(network, (images,), dynamic_shapes=shapes)
        except Exception as error:  # torch.export raises many kinds
            if most is not None:
                raise AttarError(
                    f"{type(network).__name__} takes a fixed number of images only ({first_line(error)}): leave out "
                    "--dynamic-batch."
                ) from error
            raise refusal(network, error, format_name) from error


def refusal(network: nn.Module, error: BaseException, format_name: str) -> AttarError:
    """Build the sentence on a network that a format has not: the operator, told somewhere along the chain of causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    who = type(network).__name__
    match = next((found for part in chain if (found := _OPERATOR.search(str(part)))), None)
    if match is not None:
        return AttarError(
            f"{format_name} has no operator for {match[1]}::{match[2]}, which {who} uses: replace it in the network."
        )
    return AttarError(
        f"{who} cannot be exported to {format_name} ({first_line(chain[-1])}): change that in the network."
    )


def in_batches(answer: Callable[[Images], Logits], images: Images, batch: int, *, pad: bool) -> Logits:
    """Answer N images `batch` at a time; `pad` fills the last batch up, for files that take no fewer."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part) if pad else 0
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(answer(np.ascontiguousarray(padded))[: len(part)])
    return np.concatenate(parts)


@contextlib.contextmanager
def silence(*, native: bool = False) -> Iterator[None]:
    """Keep exporters and runtimes from talking: what matters is said by what they raise.

    Args:
        native: also what C++ code writes to the standard error.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        said = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            _no_native_errors(native),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _no_native_errors(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
