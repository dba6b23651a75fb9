"""Every error the library raises on purpose: one base class, one type per kind of mistake."""

from __future__ import annotations


class GpugradError(Exception):
    """Base of all errors raised by gpugrad."""


class ShapeError(GpugradError, ValueError):
    """Shapes that do not fit together."""


class DTypeError(GpugradError, TypeError):
    """A dtype that the operation cannot take."""


class ParameterError(GpugradError, ValueError):
    """A value that a parameter cannot take."""


class OutOfRangeError(GpugradError, IndexError):
    """An index or a class label that points outside what it is meant for."""


class DeviceError(GpugradError, RuntimeError):
    """Operands on different devices, or a device that cannot be used here."""


class GraphError(GpugradError, RuntimeError):
    """A backward pass that the recorded graph cannot give."""


class FreedGraphError(GraphError):
    """The saved arrays of this graph are gone: an earlier backward pass released them."""


class InplaceError(GraphError):
    """An in-place change that would make a gradient wrong."""


class DeclarationError(GpugradError, TypeError):
    """A primitive whose declaration does not hold together."""


class KernelError(GpugradError, RuntimeError):
    """A compiled kernel that cannot be made, loaded or used where it was required."""


class CompileError(GpugradError, RuntimeError):
    """A function that cannot become a program: it does what a program cannot do again."""


class GradientCheckError(GpugradError, AssertionError):
    """A derivative that disagrees with finite differences."""
