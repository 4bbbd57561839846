"""One thread per test process: processes with several threads each wait for one another, tens of times longer."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for every subprocess

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
