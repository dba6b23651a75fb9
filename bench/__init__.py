"""Benchmarks: workloads, who computes them, what runs them, and how results are shown.

The folder stands at the top of the repository and is imported as `gpugrad.bench` through the link
`gpugrad/bench`, as the kernels are. The scripts in it run from a checkout as well, as
``python bench/run.py``.
"""
