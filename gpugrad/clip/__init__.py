"""Norms of gradients, and clipping by them, without reading a value from the device.

The policies are what an optimiser's `step(clip=…)` takes; a number stands for `GlobalNorm`:

=================  =================================================================================
`GlobalNorm`       all gradients together, to a norm (any order from 0.5 on, or infinity)
`Value`            every element, to an interval
`TensorNorm`       each gradient by itself, to a norm
`AGC`              each unit of a layer, to a share of the norm of its weights
`AutoClip`         all together, to a percentile of the norms so far
`ZClip`            all together, where the norm is an outlier among those so far
=================  =================================================================================

The attribute `gpugrad.clip` is the function of the array namespace, so import from here:
`from gpugrad.clip import AutoClip`.

On the CPU the Euclidean norm in `step(clip=…)` reads only what it must. The gradient of a weight of
2^19 elements or more, in float32 or float64, which a batch brings to a parameter that an optimiser
holds, is squared and summed as it is written, and not read again for the norm; that is where our
own kernel writes it, with vectors of 64 bytes (AVX-512) and inputs of 8 MB at most. Another
contribution ends that, and so does a look at `.grad`, for whoever sees a gradient may change it:
such a gradient is read like all others. Other norms, and `nn.utils.clip_grad_norm_`, read every
gradient. On a GPU gradients of weights are written by cuBLAS, and every norm reads all of them. The
result is the same, up to rounding.
"""

from __future__ import annotations

from gpugrad.clip.adaptive import AutoClip, ZClip
from gpugrad.clip.checks import check_bound, check_norm_type
from gpugrad.clip.norms import max_abs, nonfinite_count, norm_of, sum_of_squares, total_norm
from gpugrad.clip.policies import AGC, GlobalNorm, GradientPolicy, NormPolicy, TensorNorm, Value
from gpugrad.clip.scaling import clip_by_norm_, clip_by_value_, coefficient, scale_

__all__ = [
    "AGC",
    "AutoClip",
    "GlobalNorm",
    "GradientPolicy",
    "NormPolicy",
    "TensorNorm",
    "Value",
    "ZClip",
    "check_bound",
    "check_norm_type",
    "clip_by_norm_",
    "clip_by_value_",
    "coefficient",
    "max_abs",
    "nonfinite_count",
    "norm_of",
    "scale_",
    "sum_of_squares",
    "total_norm",
]
