"""Workloads and their clock on a device, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    """What a process with a stand-in for a GPU reports."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.device_scenario"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_workload_computes_on_a_device_what_it_does_on_the_host(found):
    assert found["failed"] == {}
    assert found["differs"] == {}


def test_every_workload_is_timed_by_events(found):
    assert found["timed"] == found["workloads"] > 40


def test_the_device_says_what_it_is_and_has_ceilings(found):
    assert found["about"]["device"] == "cuda:0"
    assert found["about"]["name"]
    assert found["ceilings"]["bandwidth"] > 0
    assert found["ceilings"]["flops"] > 0
