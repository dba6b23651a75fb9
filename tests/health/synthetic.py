"""Records made of formulas, for pictures that need a run and no training."""

import numpy as np

from gpugrad.health.record import SCALARS, STATISTICS, Record


class Filled(Record):
    """A record with all its rows at once, however many: nothing is thinned."""

    def __init__(self, layers, kinds, steps, values, scalars):
        super().__init__(layers, kinds)
        shape = len(steps), len(layers)
        self._filled = (
            np.asarray(steps, np.int64),
            {s: np.asarray(values.get(s, np.full(shape, np.nan)), np.float32) for s in STATISTICS},
            {s: np.asarray(scalars.get(s, np.full(shape[0], np.nan)), np.float32) for s in SCALARS},
        )

    steps = property(lambda self: self._filled[0])
    values = property(lambda self: self._filled[1])
    scalars = property(lambda self: self._filled[2])

    def __len__(self):
        return len(self.steps)


def make(rows=300, depth=4, growth=1.0, every=10, seed=0):
    """`depth` pairs of Linear and Tanh whose backward signal grows by `growth` a layer back."""
    rng = np.random.default_rng(seed)
    layers = [f"{2 * i + k}" for i in range(depth) for k in range(2)]
    kinds = ["Linear", "Tanh"] * depth
    shape = rows, 2 * depth
    own = np.where(np.arange(2 * depth) % 2, np.nan, 1.0)  # of layers with parameters
    t = np.linspace(0, 1, rows)[:, None]
    noise = np.exp(rng.normal(0, 0.1, shape))
    signal = 0.01 * growth ** np.arange(2 * depth, 0, -1.0) * noise
    norms = 5 * signal * own
    std = (0.5 + 0.4 * t) * noise
    values = {
        "gradient_norm": norms,
        "gradient_max": norms / 3,
        "gradient_nonfinite": np.zeros(shape) * own,
        "parameter_norm": (4 + t) * own,
        "parameter_min": (-0.3 - 0.2 * t) * own,
        "parameter_max": (0.4 + 0.3 * t) * own,
        "update_ratio": 1e-3 * noise * own,
        "activation_mean": 0.1 * t * np.ones(shape),
        "activation_std": std,
        "activation_min": -3 * std,
        "activation_max": 3 * std,
        "activation_nonfinite": np.zeros(shape),
        "saturated": np.where(np.isnan(own), 0.2 * t, np.nan),
        "signal": signal,
    }
    norm = np.sqrt(np.nansum(norms**2, axis=1))
    scalars = {
        "loss": 2.3 * np.exp(-2 * t[:, 0]),
        "lr": np.full(rows, 1e-3),
        "norm": norm,
        "coefficient": np.minimum(1, np.median(norm) / norm),
    }
    return Filled(layers, kinds, every * np.arange(rows) + 1, values, scalars)
