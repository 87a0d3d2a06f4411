"""One thread for every test: the machine is shared, and two OpenMP pools on two cores collapse."""

import logging
import os
import re
import signal
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

import matrix
import relay
import undertow as ut

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
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


class _Deprecated(logging.Handler):
    """Keeps what transformers logs as deprecated: it warns so, too."""

    THEIRS = re.compile(
        r"generation-related arguments=\(\{.*min_new_tokens"
    )  # assisted generation calls its assistant so

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record):
        said = record.getMessage()
        if re.search("deprecated|will be removed", said) and not self.THEIRS.search(said):
            self.said.append(said)


@pytest.fixture(autouse=True)
def nothing_deprecated(request):
    """What transformers has deprecated is an error, as its warnings are (pyproject.toml)."""
    handler, logger = _Deprecated(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert request.node.get_closest_marker("deprecated") or not handler.said, handler.said[0]


EVERY_TIME = ("row_2_executor_equals_references", "row_3_cached_equals_full")  # of depth x time pairs
OF_SCHEDULES = ("row_5_causal", "row_6_exact_limits", "row_10_checkpointing_and_accumulation")  # not of layers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What the matrix leaves to `make test-all`, as it repeats what other cases show.

    A depth and a time method together run two rows by default: each alone runs every row, and what pairs add is in the
    executor. Families beyond the first three differ in their layers: they leave out the rows that are about schedules,
    but for the memory that enters every layer's keys and values.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        case, row = given.get("case"), getattr(given.get("row"), "__name__", given.get("row"))
        if not isinstance(case, matrix.Case) or row is None:
            continue
        pair = case.depth is not None and case.time is not None
        further = case.family not in matrix.EVERY_SCHEDULE and not isinstance(case.time, ut.LRT)
        if (pair and row not in EVERY_TIME) or (further and row in OF_SCHEDULES):
            item.add_marker(pytest.mark.slow)
