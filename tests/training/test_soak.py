"""`benchmarks/soak.py`, shortly: faults of every kind, and at the end the run that nothing happened to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_eight_faults(tmp_path):
    command = [
        sys.executable,
        "benchmarks/soak.py",
        "--faults",
        "8",
        "--seed",
        "1",
        "--out",
        str(tmp_path / "soak.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["faults"] >= 8 and found["runs"] >= 1 and found["different"] == 0


FIGURES = ROOT / "benchmarks" / "results" / "soak.json"


@pytest.mark.skipif(not FIGURES.exists(), reason="the soak was not run to its end yet")
def test_the_figures_in_the_documentation_are_those_of_the_result_file():
    found = json.loads(FIGURES.read_text())
    page = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    assert f"{found['faults']} faults" in page and f"{found['runs']} runs" in page
    assert found["faults"] >= 50 and found["different"] == 0
    for kind, count in found["kinds"].items():
        assert f"| {kind} | {count} |" in page, kind
