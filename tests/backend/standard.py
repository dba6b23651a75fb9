"""The functions of the Array API standard, 2024.12, each with arguments to try it on."""

from __future__ import annotations

from typing import Any

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


UNARY = _words(
    "abs acosh asin asinh acos atan atanh bitwise_invert ceil conj cos cosh exp expm1 floor imag "
    "isfinite isinf isnan log log1p log2 log10 logical_not negative positive real reciprocal round "
    "sign signbit sin sinh square sqrt tan tanh trunc"
)
BINARY = _words(
    "add atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor copysign "
    "divide equal floor_divide greater greater_equal hypot less less_equal logaddexp logical_and "
    "logical_or logical_xor maximum minimum multiply nextafter not_equal pow remainder subtract"
)
CREATION = _words(
    "arange asarray empty empty_like eye from_dlpack full full_like linspace meshgrid ones "
    "ones_like tril triu zeros zeros_like"
)
OTHERS = _words(
    "all any argmax argmin argsort astype broadcast_arrays broadcast_to can_cast clip concat "
    "count_nonzero cumulative_prod cumulative_sum diff expand_dims finfo flip iinfo isdtype matmul "
    "matrix_transpose max mean min moveaxis nonzero permute_dims prod repeat reshape result_type "
    "roll searchsorted sort squeeze stack std sum take take_along_axis tensordot tile unique_all "
    "unique_counts unique_inverse unique_values unstack var vecdot where"
)
CONSTANTS = _words("e inf nan newaxis pi")
DTYPES = _words(
    "bool complex64 complex128 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
)
LINALG = _words(
    "cholesky cross det diagonal eigh eigvalsh inv matmul matrix_norm matrix_power matrix_rank "
    "matrix_transpose outer pinv qr slogdet solve svd svdvals tensordot trace vecdot vector_norm"
)
FFT = _words(
    "fft ifft fftn ifftn rfft irfft rfftn irfftn hfft ihfft fftfreq rfftfreq fftshift ifftshift"
)
FUNCTIONS = (*UNARY, *BINARY, *CREATION, *OTHERS)

_rng = np.random.default_rng(3)
X = _rng.normal(size=(3, 4))
Y = _rng.normal(size=(3, 4))
POSITIVE = np.abs(X) + 1.5
SMALL = np.tanh(X)
INTS = np.array([[1, 2, 3], [4, 5, 6]])
BOOLS = X > 0
SQUARE = X @ X.T + np.eye(3)
SORTED = np.array([0.0, 1.0, 2.0, 2.0, 5.0])

_INTEGER = {"bitwise_invert", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift",
            "bitwise_right_shift"}  # fmt: skip
_DOMAIN = {"acosh": POSITIVE, "asin": SMALL, "acos": SMALL, "atanh": SMALL, "log": POSITIVE,
           "log1p": POSITIVE, "log2": POSITIVE, "log10": POSITIVE, "sqrt": POSITIVE,
           "logical_not": BOOLS}  # fmt: skip

#: (name, arguments, keyword arguments). Arrays are NumPy's; a test sends them to its device.
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *((n, (INTS if n in _INTEGER else _DOMAIN.get(n, X),), {}) for n in UNARY if n != "imag"),
    *((n, (POSITIVE if n == "pow" else BOOLS if n.startswith("logical") else
           INTS if n in _INTEGER else X,
           ~BOOLS if n.startswith("logical") else INTS if n in _INTEGER else Y), {})
      for n in BINARY),
    ("real", (X + 1j * Y,), {}), ("imag", (X + 1j * Y,), {}), ("conj", (X + 1j * Y,), {}),
    ("abs", (X + 1j * Y,), {}), ("floor", (INTS,), {}), ("square", (INTS,), {}),
    ("add", (X, 2.0), {}), ("multiply", (X[:1], Y), {}), ("maximum", (X, 0.0), {}),
    ("pow", (X, 2), {}),
    *((n, (X,), kw) for n in ("sum", "prod", "max", "min", "mean", "std", "var")
      for kw in ({}, {"axis": 0}, {"axis": (0, 1), "keepdims": True})),
    *((n, (BOOLS,), kw) for n in ("all", "any") for kw in ({}, {"axis": 1, "keepdims": True})),
    ("sum", (INTS,), {}), ("var", (X,), {"correction": 1.0}), ("std", (X,), {"correction": 1.0}),
    *((n, (X,), {"axis": 1, "keepdims": True}) for n in ("argmax", "argmin")),
    ("argsort", (X,), {"axis": 0}), ("sort", (X,), {"axis": 0, "stable": True}),
    ("broadcast_arrays", (X, Y[:1]), {}), ("broadcast_to", (X[:1], (3, 4)), {}),
    ("clip", (X, -0.5, 0.5), {}), ("clip", (X,), {"min": 0.0}), ("clip", (X,), {"max": 0.0}),
    ("concat", ([X, Y],), {"axis": 1}), ("concat", ([X, Y],), {"axis": None}),
    ("count_nonzero", (INTS,), {"axis": 0, "keepdims": True}),
    ("cumulative_sum", (X,), {"axis": 1}), ("cumulative_prod", (X,), {"axis": 0}),
    ("cumulative_sum", (X,), {"axis": 1, "include_initial": True}),
    ("diff", (X,), {"axis": 0}), ("expand_dims", (X,), {"axis": 1}), ("flip", (X,), {"axis": 0}),
    ("matmul", (X, Y.T.copy()), {}), ("matrix_transpose", (X,), {}), ("moveaxis", (X, 0, 1), {}),
    ("nonzero", (INTS - 2,), {}), ("permute_dims", (X, (1, 0)), {}),
    ("repeat", (X, 2), {"axis": 1}), ("reshape", (X, (4, 3)), {}), ("reshape", (X, (-1,)), {}),
    ("roll", (X, 1), {"axis": 1}), ("searchsorted", (SORTED, X), {"side": "right"}),
    ("squeeze", (X[:1],), {"axis": 0}), ("stack", ([X, Y],), {"axis": 1}),
    ("take", (X, np.array([2, 0])), {"axis": 0}),
    ("take_along_axis", (X, np.argsort(X, axis=1)), {"axis": 1}),
    ("tensordot", (X, Y), {"axes": ((1,), (1,))}), ("tile", (X, (2, 1)), {}),
    ("tril", (X,), {"k": 1}), ("triu", (X,), {"k": -1}), ("unstack", (X,), {"axis": 1}),
    ("vecdot", (X, Y), {"axis": -1}), ("where", (BOOLS, X, Y), {}), ("where", (BOOLS, X, 0.0), {}),
    ("meshgrid", (X[0], Y[:, 0]), {"indexing": "ij"}),
    *((n, (INTS % 3,), {}) for n in ("unique_all", "unique_counts", "unique_inverse",
                                     "unique_values")),
    ("ones_like", (X,), {}), ("zeros_like", (X,), {}), ("full_like", (X, 7.0), {}),
]  # fmt: skip

#: The same for the extension ``linalg``; results that are unique only up to a sign are left out.
LINALG_CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("cholesky", (SQUARE,), {}), ("cross", (X[:, :3], Y[:, :3]), {}), ("det", (SQUARE,), {}),
    ("diagonal", (SQUARE,), {"offset": 1}), ("eigvalsh", (SQUARE,), {}), ("inv", (SQUARE,), {}),
    ("matrix_norm", (X,), {"keepdims": True}), ("matrix_power", (SQUARE, 3), {}),
    ("matrix_rank", (X,), {}), ("matrix_transpose", (X,), {}), ("matmul", (SQUARE, X), {}),
    ("outer", (X[0], Y[0]), {}), ("pinv", (X,), {}), ("slogdet", (SQUARE,), {}),
    ("solve", (SQUARE, X), {}), ("svdvals", (X,), {}), ("tensordot", (X, Y), {"axes": 2}),
    ("trace", (SQUARE,), {"offset": 1}), ("vecdot", (X, Y), {"axis": -2}),
    *(("vector_norm", (X,), {"axis": 1, "ord": p}) for p in (0, 1, 2, 3, np.inf, -np.inf)),
]  # fmt: skip
