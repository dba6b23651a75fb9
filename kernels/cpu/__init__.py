"""Kernels for NumPy arrays, compiled by Numba when they are first wanted.

This file is a table and imports no compiler: which operation has kernels in which module, and from
how many elements on they are quicker than NumPy.
"""

from gpugrad.backend.kernels import slots
from gpugrad.kernels.formula import APPROXIMATE, PLAIN

SLOTS = slots(
    __name__,
    {
        "elementwise": (1 << 14, (*PLAIN, *APPROXIMATE)),
        "bias": (1 << 14, ("bias_activation", "bias_activation_backward")),
        "dropout": (
            1 << 12,
            ("dropout", "bias_activation_dropout", "bias_activation_dropout_backward"),
        ),
        # As many indices: their rows have some hundred elements each.
        "embedding": (1 << 7, ("embedding", "embedding_backward")),
        "batch_norm": (
            1 << 12,
            (
                "batch_moments",
                "batch_norm_training",
                "batch_norm_backward",
                "batch_norm_inference",
                "batch_norm_inference_backward",
            ),
        ),
        "norm": (
            1 << 12,
            (
                "layer_norm",
                "add_layer_norm",
                "layer_norm_backward",
                "rms_norm",
                "add_rms_norm",
                "rms_norm_backward",
                "group_norm",
                "add_group_norm",
                "group_norm_backward",
            ),
        ),
        "gather": (1 << 12, ("gather", "scatter_add_along_axis")),
        "select": (1 << 14, ("where",)),
        "reductions": (
            1 << 12,
            (
                "var",
                "std",
                "var_backward",
                "logsumexp",
                "logsumexp_backward",
                "extreme_backward",
            ),
        ),
        "scan": (1 << 12, ("cumulative_sum", "cumulative_prod", "cumulative_sum_backward")),
        "layout": (1 << 16, ("exchanged_copy",)),
        "losses": (1 << 12, ("pointwise_loss", "pointwise_loss_backward")),
        "reduce": (1 << 12, ("sum_of_squares", "max_abs", "nonfinite_count", "scaled")),
        "attention": (
            1 << 10,
            (
                "attention",
                "attention_backward",
                "packed_attention",
                "packed_attention_backward",
            ),
        ),
        "recurrent": (
            1 << 10,
            (
                "rnn_layer",
                "lstm_layer",
                "gru_layer",
                "rnn_gradients",
                "lstm_gradients",
                "gru_gradients",
            ),
        ),
        "convolution": (1 << 10, ("convolution", "convolution_backward")),
        "transposed": (
            1 << 10,
            ("transposed_convolution", "transposed_convolution_backward"),
        ),
        "linear": (
            1 << 11,
            ("linear", "linear_activation", "linear_activation_backward", "sum_over_rows"),
        ),
        "wide": (1 << 9, ("layers", "layers_backward")),  # small ones too: kernels/cpu/layers.py
        "moments": (1 << 8, ("moments",)),
        "products": (1 << 14, ("matmul", "matmul_into")),
        "weight_gradient": (1 << 12, ("weight_gradient",)),
        "optimizer": (1 << 14, ("flat_norm", "flat_step", "flat_update")),
        "softmax": (
            1 << 14,
            ("softmax", "softmax_backward", "log_softmax", "log_softmax_backward"),
        ),
        "pooling": (
            1 << 12,
            ("max_pool", "max_pool_backward", "window_mean", "window_mean_backward"),
        ),
        "cross_entropy": (1 << 6, ("class_cross_entropy", "class_cross_entropy_backward")),
    },
)
