"""Kernels for CuPy arrays: bodies, the compiler they are made with, and their launchers.

A body is written once, with the placeholders of `kernels/template.py` and `language.py`. Built for
the wheel (`build.py`) or compiled when first wanted (`compiler.py`), it becomes PTX text, which the
CUDA driver turns into machine code (`launch.py`). Importing this package imports neither CuPy nor a
compiler.
"""

from gpugrad.backend.kernels import slots
from gpugrad.kernels.formula import APPROXIMATE, PLAIN

#: Which operation has kernels in which module. On a GPU they pay at any size: a launch less is one
#: launch less.
SLOTS = slots(
    __name__,
    {
        "elementwise": (0, (*PLAIN, *APPROXIMATE)),
        "bias": (0, ("bias_activation", "bias_activation_backward", "sum_over_rows")),
        "dropout": (
            0,
            ("dropout", "bias_activation_dropout", "bias_activation_dropout_backward"),
        ),
        "embedding": (0, ("embedding", "embedding_backward")),
        "softmax": (0, ("softmax", "softmax_backward", "log_softmax", "log_softmax_backward")),
        "cross_entropy": (0, ("class_cross_entropy", "class_cross_entropy_backward")),
        "norm_launch": (
            0,
            (
                *(
                    f"{name}{part}"
                    for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm_inference")
                    for part in ("", "_backward")
                ),
                *("add_layer_norm", "add_rms_norm", "add_group_norm"),
                *("batch_moments", "batch_norm_training", "batch_norm_backward"),
            ),
        ),
        "attention_launch": (
            0,
            tuple(
                f"{name}{part}"
                for name in ("attention", "packed_attention")
                for part in ("", "_backward")
            ),
        ),
        "recurrent": (
            0,
            tuple(
                f"{name}_step{part}"
                for name in ("rnn", "lstm", "gru")
                for part in ("", "_backward")
            ),
        ),
        "optimizer": (0, ("flat_norm", "flat_update", "flat_step")),
        "moments": (0, ("moments", "sum_of_squares", "max_abs", "nonfinite_count")),
    },
)
