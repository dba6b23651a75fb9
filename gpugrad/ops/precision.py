"""Which operations :class:`gpugrad.autocast` converts the operands of."""

from __future__ import annotations

from gpugrad.core.autocast import NARROWS

__all__: list[str] = []

#: What is quicker in a narrow type, and adds up in float32 by itself.
PRODUCTS = (
    "matmul", "linear", "linear_activation", "layers", "tensordot", "convolution",
    "transposed_convolution", "attention", "packed_attention", "rnn_layer", "lstm_layer",
    "gru_layer",
)  # fmt: skip

#: What loses too much of a narrow type's range or precision.
SENSITIVE = (
    "exp", "expm1", "log", "log1p", "log2", "log10", "logaddexp", "pow", "reciprocal", "softplus",
    "asin", "acos", "tan", "sinh", "cosh",
    "sum", "mean", "var", "std", "prod", "cumulative_sum", "cumulative_prod", "logsumexp",
    "softmax", "log_softmax", "class_cross_entropy",
    "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "group_norm", "add_group_norm",
    "batch_norm_training", "batch_norm_inference",
)  # fmt: skip

NARROWS |= dict.fromkeys(PRODUCTS, True) | dict.fromkeys(SENSITIVE, False)
