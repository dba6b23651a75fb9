"""The number of threads, under PyTorch's names."""

import pytest

import gpugrad as gg
from gpugrad.backend.threads import describe_threads
from gpugrad.errors import ParameterError


def test_the_number_of_threads():
    before = gg.get_num_threads()
    try:
        gg.set_num_threads(1)
        assert gg.get_num_threads() == 1
        assert describe_threads()["threads"] == "1 (set_num_threads(1))"
    finally:
        gg.set_num_threads(before)
    assert gg.get_num_threads() == before


@pytest.mark.parametrize("n", [0, -1, 1.5, True, 10_000])
def test_numbers_that_there_are_not(n):
    with pytest.raises(ParameterError, match=r"set_num_threads: .* must be a whole number from 1"):
        gg.set_num_threads(n)
