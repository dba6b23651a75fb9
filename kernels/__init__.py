"""Kernel bodies and their launchers, one file per family.

The folder stands at the top of the repository, where a reader looks for it, and is imported as
`gpugrad.kernels` through the link `gpugrad/kernels`. Under a second name every kernel would be
compiled, registered and cached twice, so any other name is refused.
"""

if __name__ != "gpugrad.kernels":
    raise ImportError(
        f"the kernels were imported as {__name__!r}; their one name is 'gpugrad.kernels'. "
        "Write `import gpugrad.kernels`, with gpugrad installed (pip install -e .)."
    )
