"""What every kernel is measured against: its operation's generic text, and float64."""

import ml_dtypes
import numpy as np

import gpugrad as gg
from gpugrad.core.tensor import tensor_of

DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}

#: Half a unit in the last place, relative.
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def wide(x):
    return np.asarray(x).astype("float64")


def run(mode, function, *arrays, g=None, **parameters):
    """Result and gradients of all arrays, as raw arrays, in a mode of the kernels."""
    tensors = [tensor_of(x).requires_grad_() for x in arrays]
    with gg.use_kernels(mode):
        y = function(*tensors, **parameters)
        y.backward(tensor_of(np.ones_like(y.data) if g is None else g))
    return [y.data, *(t.grad.data for t in tensors)]


def layouts(x):
    """The elements of `x`, lying in memory in different ways."""
    yield "contiguous", np.ascontiguousarray(x)
    yield "strided", np.repeat(x, 2, axis=-1)[..., ::2]
    yield "reversed", np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    yield "transposed", np.asfortranarray(x)
    raw = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    yield "misaligned", raw
    own = np.ascontiguousarray(x)
    own.flags.writeable = False
    yield "read-only", own
