"""One thread for every test: the machine is shared, and two OpenMP pools on two cores collapse."""

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

import matrix
import relay

torch.set_num_threads(1)
if os.environ.get("UNDERTOW_RELAY", "0") != "0":
    relay.install()

if find_spec("hypothesis"):  # not everywhere where some of these tests run
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None, derandomize=True, database=None)  # same cases, however slow
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def seeded():
    """Same numbers every run, whatever ran before."""
    torch.manual_seed(0)


EVERY_TIME = ("row_2_executor_equals_references", "row_3_cached_equals_full")  # of depth x time pairs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A depth and a time method together run two rows of the matrix by default (and all of them in `make test-all`):
    each alone runs every row, and what pairs add is in the executor."""
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        pair = isinstance(case, matrix.Case) and case.depth is not None and case.time is not None
        row = item.callspec.params.get("row") if pair else None
        if pair and row is not None and getattr(row, "__name__", row) not in EVERY_TIME:
            item.add_marker(pytest.mark.slow)
