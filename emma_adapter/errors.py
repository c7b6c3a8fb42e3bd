"""The errors of this library. Each is also the built-in error a caller would expect."""

from __future__ import annotations


class EmmaError(Exception):
    """Base class: ``except EmmaError`` catches everything this library raises on purpose."""


class ConfigError(EmmaError, ValueError):
    """A field of :class:`~emma_adapter.EmmaConfig`, or an argument of a tool, has a value that is not allowed."""


class ShapeError(EmmaError, ValueError):
    """A tensor does not have the shape that the adapter was made for."""


class UnsupportedModelError(EmmaError, ValueError):
    """The model, or this kind of vision tower or projector, is not supported."""


class PatchError(EmmaError, RuntimeError):
    """The model is already patched, or not patched at all."""


class InstructionError(EmmaError, ValueError):
    """The instruction of a call can't be determined, or doesn't fit the call."""


class KernelError(EmmaError, RuntimeError):
    """The Triton kernels were asked for and can't compute this call."""


class RoutingError(EmmaError, ValueError):
    """Images and placeholder tokens of a call don't match."""


class EncoderError(EmmaError, RuntimeError):
    """An instruction encoder can't be loaded or broke its protocol."""


class AutoencoderError(EmmaError, RuntimeError):
    """The autoencoder of a unified model can't be loaded, broke its protocol, or made values that aren't finite."""


class CheckpointError(EmmaError, ValueError):
    """A saved adapter can't be read, or doesn't fit the model."""


class DataError(EmmaError, ValueError):
    """A dataset, or a row of one, can't be trained on, drawn from, or judged."""


class AnalysisError(EmmaError, ValueError):
    """:mod:`emma_adapter.analysis` can't answer the question from this model or these data."""
