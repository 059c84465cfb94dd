"""What a cache costs a pipeline on the host, as benchmarks/pipeline_overhead.py measures it."""

import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import pipeline_overhead as overhead


@pytest.mark.parametrize("spec", ["N3-1000-0-b0-o1", "N2-1000-0"])
def test_a_cache_costs_less_than_20_ms_per_call(spec):
    pipe, call = overhead.small_flux()
    found = overhead.measure(pipe, call | {"num_inference_steps": 10}, spec, repeats=3)
    assert 0 < found["enable"] < 20
    assert 0 < found["call"] < 20


def test_nested_functions_are_timed_once():
    def busy(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    clock = overhead.Clock()
    inner = clock.around(busy)
    clock.around(lambda: (inner(0.01), busy(0.01)))()
    assert 0.02 <= clock.seconds < 0.04
