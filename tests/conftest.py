"""One thread for every test: the machine is shared, and two OpenMP pools on two cores collapse."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Same numbers every run, whatever ran before."""
    torch.manual_seed(0)
