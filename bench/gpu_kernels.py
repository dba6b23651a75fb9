"""Every family of kernels that ships, timed where it runs: as a share of what the device can do.

A case calls gpugrad as a user does, forward and backward. Meanwhile the choices of kernels are
listened to, and each that was made is then run again with the very operands it got: so the kernel
is timed, without the engine around it, and nothing here has to know how it is called.

Three sizes. Small enough for the L2 cache, with the same operands again and again ("L2"), or
with so many sets of operands in turn that none is in the cache any more ("L2, in turn"); and
several times as large as the cache ("HBM"). Bytes are the fewest that must be moved: every operand
read once, every result written once. The ceiling of a row is a copy of as many bytes, made in the
same way; of attention also the rate of a product of matrices.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import common
from bench.gpu_device import (
    Notes,
    fake_counts,
    is_out_of_memory,
    message,
    open_device,
    own_launches,
    seconds_left,
)

#: Elements of the largest operand, float32: 4 MiB, and 256 MiB. And when only tried.
ELEMENTS = {"L2": 2**20, "HBM": 2**26}
SMALL = {"L2": 2**10, "HBM": 2**12}

SIZES = ("HBM", "L2", "L2, in turn")

#: Longest that one row may take on the device and the host, in seconds.
ROW = 0.12


class Inputs:
    """Operands of a case: fresh tensors of gpugrad on the device."""

    def __init__(self, device: Any, elements: int, small: bool, dtype: str = "float32") -> None:
        self.device, self.elements, self.small, self.dtype = device, elements, small, dtype

    def columns(self, usual: int) -> int:
        return min(usual, 32) if self.small else usual

    def rows(self, usual: int) -> tuple[int, int]:
        """A matrix of so many columns, as near as can be to the elements wanted."""
        columns = self.columns(usual)
        return max(2, self.elements // columns), columns

    def new(self, *shape: int, grad: bool = True) -> Any:
        import ml_dtypes

        import gpugrad as gg

        dtype: Any = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        x = gg.asarray(self.device.random(*shape, dtype=dtype))
        return x.requires_grad_() if grad else x

    def numbers(self, below: int, *shape: int) -> Any:
        import numpy as np

        import gpugrad as gg

        drawn = np.random.default_rng(0).integers(0, below, shape)
        return gg.tensor(drawn, device=self.device.device)


def both(inputs: Inputs, y: Any) -> None:
    """The backward pass, from a gradient that is not constant."""
    y = y[0] if isinstance(y, tuple) else y
    y.backward(inputs.new(*y.shape, grad=False))


def _map(name: str) -> Callable[[Inputs], None]:
    def run(i: Inputs) -> None:
        import gpugrad as gg

        both(i, getattr(gg.nn.functional, name)(i.new(*i.rows(1024))))

    return run


def _bias(i: Inputs) -> None:
    import gpugrad as gg

    rows, columns = i.rows(4096)
    y = gg.bias_activation(i.new(rows, columns), i.new(columns), activation="gelu_tanh")
    both(i, y)


def _dropout(i: Inputs) -> None:
    import gpugrad as gg

    rows, columns = i.rows(1024)
    both(i, gg.dropout(i.new(rows, columns), 0.1, seed=1))
    y = gg.bias_activation_dropout(
        i.new(rows, columns), i.new(columns), i.new(rows, columns), activation="relu", p=0.1, seed=1
    )
    both(i, y)


def _cross_entropy(i: Inputs) -> None:
    import gpugrad as gg

    rows, columns = i.rows(32768)
    gg.nn.functional.cross_entropy(i.new(rows, columns), i.numbers(columns, rows)).backward()


def _embedding(i: Inputs) -> None:
    import gpugrad as gg

    rows, columns = i.rows(256)
    table = i.new(64 if i.small else 32768, columns)
    both(i, gg.nn.functional.embedding(i.numbers(table.shape[0], rows), table))


def _norm(name: str) -> Callable[[Inputs], None]:
    def run(i: Inputs) -> None:
        import gpugrad as gg

        F, (rows, columns) = gg.nn.functional, i.rows(1024)
        x, w, b = i.new(rows, columns), i.new(columns), i.new(columns)
        residual = i.new(rows, columns) if name.startswith("add_") else None
        if name == "layer_norm":
            both(i, F.layer_norm(x, (columns,), w, b))
        elif name == "rms_norm":
            both(i, F.rms_norm(x, (columns,), w))
        elif name == "add_layer_norm":
            both(i, gg.add_layer_norm(x, residual, w, b))
        elif name == "add_rms_norm":
            both(i, gg.add_rms_norm(x, residual, w))
        else:
            _channels(i, name)

    return run


def _channels(i: Inputs, name: str) -> None:
    import gpugrad as gg

    channels, side = (8, 4) if i.small else (64, 32)
    shape = (max(2, i.elements // (channels * side * side)), channels, side, side)
    x, w, b = i.new(*shape), i.new(channels), i.new(channels)
    if name == "group_norm":
        both(i, gg.nn.functional.group_norm(x, 8, w, b))
    elif name == "add_group_norm":
        both(i, gg.add_group_norm(x, i.new(*shape), w, b, groups=8))
    else:
        training = name == "batch_norm"
        mean, var = i.new(channels, grad=False), gg.abs(i.new(channels, grad=False)) + 1.0
        both(i, gg.nn.functional.batch_norm(x, mean, var, w, b, training=training))


def _attention(i: Inputs) -> None:
    import gpugrad as gg

    length, width = (8, 16) if i.small else (1024, 64)
    heads = max(1, i.elements // (16 * length * width))  # 16: the work grows with the length
    q, k, v = (i.new(1, heads, length, width) for _ in range(3))
    both(i, gg.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def _packed(i: Inputs) -> None:
    from gpugrad.ops.attention import packed_attention

    length, width, heads = (8, 16, 1) if i.small else (1024, 64, 4)
    batch = max(1, i.elements // (16 * heads * length * width))
    y = packed_attention(i.new(batch, length, 3 * heads * width), heads=heads, is_causal=True)
    both(i, y)


def _recurrent(kind: str) -> Callable[[Inputs], None]:
    def run(i: Inputs) -> None:
        import gpugrad as gg

        width = 16 if i.small else 1024
        layer = getattr(gg.nn, kind)(8, width).to(i.device.device)
        x = i.new(2, max(2, i.elements // (4 * width)), 8)
        both(i, layer(x)[0])

    return run


def _optimizer(scaled: bool) -> Callable[[Inputs], None]:
    """A usual step, in two launches; with a scaler, one whose factor is computed in between."""

    def run(i: Inputs) -> None:
        import gpugrad as gg

        params = [i.new(max(1, i.elements // 16)) for _ in range(16)]
        optimizer = gg.optim.AdamW(params, lr=1e-3)
        for p in params:
            p.backward(i.new(*p.shape, grad=False))
        scaler = gg.optim.GradScaler() if scaled else None
        if scaler is not None:
            scaler.scale(i.new(1))  # from now on it has a scale
        optimizer.step(clip=1.0, scaler=scaler)

    return run


def _moments(i: Inputs) -> None:
    """Of the gradients of a hundred layers in one buffer."""
    import numpy as np

    from gpugrad.backend import SPACES
    from gpugrad.health.statistics import moments

    x = i.new(i.elements, grad=False).data
    ends = np.linspace(0, i.elements, 101).astype(int) // 16 * 16
    moments(SPACES[type(x)], x, bounds=np.stack((ends[:-1], ends[1:]), axis=1), low=-1.0, high=1.0)


def _rows(i: Inputs) -> None:
    """The gradient of a bias without an activation, of a batch that is not large."""
    from gpugrad.backend import SPACES
    from gpugrad.ops.linalg import sum_over_rows

    rows = min(512, i.elements)
    g = i.new(rows, i.elements // rows, grad=False).data
    sum_over_rows(SPACES[type(g)], g, g.shape[1:])


def _norms(i: Inputs) -> None:
    """What clipping asks of one gradient: its two norms, and what is not finite."""
    from gpugrad.backend import SPACES
    from gpugrad.clip import norms

    x = i.new(i.elements, grad=False).data
    for reduction in (norms.sum_of_squares, norms.max_abs, norms.nonfinite_count):
        reduction(SPACES[type(x)], x)


@dataclass(frozen=True)
class Case:
    """What makes a family's kernels run, in which storage, at which sizes."""

    family: str
    name: str
    run: Callable[[Inputs], None]
    dtype: str = "float32"
    sizes: tuple[str, ...] = SIZES


CASES = (
    Case("bias", "bias + GELU(tanh)", _bias),
    Case("bias", "sum of 512 rows", _rows),
    Case("optimizer", "AdamW, clipped", _optimizer(False)),
    Case("optimizer", "AdamW, scaled, clipped", _optimizer(True)),
    Case("moments", "moments of 100 parts", _moments),
    Case("moments", "norms of one gradient", _norms),
    *(Case("elementwise", name, _map(name)) for name in ("tanh", "gelu", "silu")),
    Case("dropout", "dropout", _dropout),
    *(Case("softmax", name, _map(name)) for name in ("softmax", "log_softmax")),
    Case("cross_entropy", "cross entropy", _cross_entropy),
    *(
        Case("norm_launch", name, _norm(name))
        for name in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "group_norm",
                     "add_group_norm", "batch_norm", "batch_norm_inference")
    ),
    Case("embedding", "embedding", _embedding),
    Case("attention_launch", "attention", _attention),
    Case("attention_launch", "packed attention", _packed),
    *(Case("recurrent", kind, _recurrent(kind)) for kind in ("RNN", "LSTM", "GRU")),
    # Storage of two bytes is read and written by other text.
    *(
        Case(family, f"{name}, {dtype}", run, dtype, sizes=("HBM",))
        for dtype in ("float16", "bfloat16")
        for family, name, run in (
            ("elementwise", "tanh", _map("tanh")), ("bias", "bias + GELU(tanh)", _bias),
            ("softmax", "softmax", _map("softmax")),
            ("norm_launch", "layer_norm", _norm("layer_norm")),
        )
    ),
)  # fmt: skip


# -- listening ------------------------------------------------------------------------------------


@dataclass
class Call:
    """A kernel with the operands that it got."""

    slot: str
    run: Callable[[], Any]
    args: tuple[Any, ...]
    bytes: int
    flops: float


@contextmanager
def listening() -> Iterator[list[Call]]:
    """The kernels that the backends choose meanwhile."""
    from gpugrad.backend.kernels import Slot

    usual = Slot.choice
    calls: list[Call] = []

    def noted(slot: Slot, run: Any, m: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(m, *args, **kwargs)
        again = partial(run, m, *args, **kwargs)
        moved = fewest_bytes(slot.name, args, kwargs, result)
        work = operations(slot.name, args, kwargs, result)
        calls.append(Call(slot.name, again, args, moved, work))
        return result

    def choice(
        self: Slot, generic: Any, m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for kernel in self.kernels:
            if kernel.refuse(m, *args, **kwargs) is None:
                return partial(noted, self, kernel.run)
        return usual(self, generic, m, args, kwargs)

    Slot.choice = choice  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Slot.choice = usual  # type: ignore[method-assign]


def arrays_in(*values: Any) -> dict[int, int]:
    """Bytes of the arrays in arguments or results, by address: each counts once."""
    found: dict[int, int] = {}
    for x in values:
        if isinstance(x, dict):
            found |= arrays_in(*x.values())
        elif isinstance(x, list | tuple):
            found |= arrays_in(*x)
        elif hasattr(x, "nbytes") and hasattr(x, "data"):
            found[id(x)] = int(x.nbytes)
    return found


def fewest_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What the operation must read and write at least."""
    read = arrays_in(args, kwargs)
    moved = read | arrays_in(result)  # a result that is an operand is written below
    total = sum(moved.values())
    if name in ("flat_step", "flat_update"):  # in place: the parameter and its states are written
        total += sum(arrays_in(args[0], args[2:]).values())
        if name == "flat_step":  # the gradient is read for its norm, and for the update
            total += int(args[1].nbytes)
    if name == "embedding":  # rows that are looked up, not the table
        total += int(result.nbytes) - int(args[1].nbytes)
    return total


def operations(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    """Multiplications and additions of what is bound by them, causal attention; else 0."""
    if "attention" not in name:
        return 0.0
    backward = name.endswith("_backward")
    x = args[1] if backward else args[0]
    if name.startswith("packed"):
        length, across = x.shape[-2], x.shape[-1] // 3
    else:
        length, across = x.shape[-2], x.shape[-1]
    batch = math.prod(x.shape[:-2])
    # Two products of length × length × across forward, five backward, half of each.
    return (5 if backward else 2) * 2.0 * batch * length * length * across / 2


# -- timing ---------------------------------------------------------------------------------------


def timing(
    device: Any, runs: list[Callable[[], Any]], seconds: float = ROW, small: bool = False
) -> dict[str, Any]:
    """Time of one run on the host and on the device, in microseconds, apart from each other.

    The device is given enough to do before, so that it works through what is timed without a
    pause; where the host was too slow for that, the row says `waits`.
    """
    for run in runs:
        run()
    device.synchronize()
    start = time.perf_counter()
    for run in runs[:3]:
        run()
    handed = (time.perf_counter() - start) / len(runs[:3])
    device.synchronize()
    whole = (time.perf_counter() - start) / len(runs[:3])
    count = 2 if small else max(2, min(50, int(2e-3 / handed), int(0.02 / whole)))
    host: list[float] = []
    work: list[float] = []
    waits = 0
    begin, turn = time.perf_counter(), 0
    while len(host) < (2 if small else 5) or (
        time.perf_counter() - begin < seconds and len(host) < 30 and not small
    ):
        device.synchronize()
        device.occupy(1.5 * handed * count + 1e-4, small)
        first = device.event()
        start = time.perf_counter()
        for _ in range(count):
            runs[turn % len(runs)]()
            turn += 1
        host.append((time.perf_counter() - start) / count)
        waits += bool(first.done)
        work.append(device.elapsed(first, device.event()) / count)
    return {
        "device_us": common.spread(work, 1e6), "host_us": common.spread(host, 1e6)["median"],
        "n": len(work), "waits": waits > len(work) // 2,
    }  # fmt: skip


class Ceilings:
    """Bandwidth of copies of as many bytes as somebody moves; the better of two ways to copy."""

    def __init__(self, device: Any, small: bool) -> None:
        self.device, self.small = device, small
        self._known: dict[tuple[int, int], float] = {}
        self._product = 0.0

    def product(self) -> float:
        """Operations a second of a product of matrices in float32."""
        if not self._product:
            n = 32 if self.small else 4096
            a, b = self.device.random(n, n), self.device.random(n, n)
            found = timing(self.device, [lambda: a @ b], ROW / 2, self.small)["device_us"]
            self._product = 2e6 * n**3 / max(found["median"], 1e-3)
        return self._product

    def of(self, moved: int, sets: int) -> float:
        """Bytes a second that are read and written."""
        half = max(16, 1 << max(4, round(math.log2(max(moved, 2) / 2))))
        if (half, sets) not in self._known:
            xp, rate = self.device.xp, 0.0
            pairs = [(xp.zeros(half // 4, "float32"), self.device.random(half // 4))
                     for _ in range(sets)]  # fmt: skip

            def kernel(a: Any, b: Any) -> None:
                a[...] = b

            for way in (self.device.copy, kernel):
                runs = [partial(way, a, b) for a, b in pairs]
                found = timing(self.device, runs, ROW / 2, self.small)["device_us"]["median"]
                rate = max(rate, 2e6 * half / max(found, 1e-3))
            self._known[half, sets] = rate
        return self._known[half, sets]


def calls_of(device: Any, case: Case, elements: int, sets: int, small: bool) -> list[list[Call]]:
    """What each set of operands makes run; one list for each slot."""
    by_slot: dict[str, list[Call]] = {}
    for _ in range(sets):
        with listening() as calls:
            case.run(Inputs(device, elements, small, case.dtype))
        mine: dict[str, list[Call]] = {}
        for call in calls:
            mine.setdefault(call.slot, []).append(call)
        for slot, found in mine.items():
            most = max(call.bytes for call in found)
            by_slot.setdefault(slot, []).append(next(c for c in found if c.bytes == most))
    return list(by_slot.values())


def rows_of(
    device: Any, ceilings: Ceilings, case: Case, size: str, small: bool
) -> Iterator[dict[str, Any]]:
    """A case at one size."""
    where, _, in_turn = size.partition(", ")
    elements = (SMALL if small else ELEMENTS)[where]
    sets = 1
    if in_turn:
        sets = 3 if small else max(2, min(12, -(-3 * device.l2 // (12 * elements))))
    for calls in calls_of(device, case, elements, sets, small):
        first = calls[0]
        row = {"family": case.family, "slot": first.slot, "case": case.name, "size": size,
               "MiB": round(first.bytes / 2**20, 3)}  # fmt: skip
        try:
            with own_launches() as names:
                first.run()
            found = timing(device, [call.run for call in calls], small=small)
            seconds = found["device_us"]["median"] / 1e6
            rate, ceiling = first.bytes / seconds, ceilings.of(first.bytes, sets)
            row |= {
                "device_us": found["device_us"]["median"],
                "quartiles": [found["device_us"][q] for q in ("q1", "q3")],
                "host_us": found["host_us"], "launches": len(names), "waits": found["waits"],
                "GB/s": common.round_to(rate / 1e9), "share": common.round_to(rate / ceiling, 3),
                "copy_GB/s": common.round_to(ceiling / 1e9), "kernels": sorted(set(names)),
            }  # fmt: skip
            if first.flops:
                rate, ceiling = first.flops / seconds, ceilings.product()
                row |= {"TFLOP/s": common.round_to(rate / 1e12),
                        "share_of_product": common.round_to(rate / ceiling, 3)}  # fmt: skip
        except Exception as error:
            row["error"] = "out of memory" if is_out_of_memory(error) else message(error)
        yield row


def measure(notes: Notes, options: argparse.Namespace) -> None:
    """Every case at every size; one that does not fit or fails does not stop the others."""
    device = open_device(options.device)
    small = options.small
    ceilings = Ceilings(device, small)
    sizes = SIZES[:1] if options.quick else SIZES
    wanted = [(size, case) for size in sizes for case in CASES if size in case.sizes]
    for i, (size, case) in enumerate(wanted):
        if seconds_left() < 3:
            notes.put(not_reached=[f"{c.name}, {s}" for s, c in wanted[i:]])
            break
        try:
            for row in rows_of(device, ceilings, case, size, small):
                notes.add("kernels", row)
        except Exception as error:  # of the case itself, which is no kernel's
            why = "out of memory" if is_out_of_memory(error) else message(error)
            notes.add("kernels", {"family": case.family, "slot": case.name, "case": case.name,
                                  "size": size, "error": why})  # fmt: skip
        device.free()
    if fake_counts() is None:
        notes.put(pool_MiB=device.xp.get_default_memory_pool().total_bytes() >> 20)


def touch(options: argparse.Namespace) -> int:
    """Every kernel once, on few elements, for somebody who looks at what it does to memory.

    Without a pool, so that every array is an allocation of its own and has an end.
    """
    device = open_device(options.device)
    device.xp.cuda.set_allocator(None)
    count = 0
    for case in CASES:
        with listening() as calls:
            case.run(Inputs(device, 1036, small=True, dtype=case.dtype))
        count += len(calls)
        device.synchronize()
        print(f"{case.name}: {len(calls)} calls", flush=True)
    return count
