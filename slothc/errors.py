"""What sloth says when something is wrong: one class for each kind, with the thing and the allowed values in the text."""

from __future__ import annotations


class SlothError(Exception):
    """Base of all errors that sloth raises for its users."""


class OptionError(SlothError, ValueError):
    """An option is unknown or has a value that is not allowed."""


class RegionDropped(UserWarning):
    """A region runs eagerly because its plan failed its check, did not compile or did not fit the device."""


class NotGraphed(UserWarning):
    """``cuda_graphs`` was asked for and a graph, or one signature of it, runs without. The text says why."""


class VerificationFailed(SlothError):
    """A plan's numbers are further from float64 truth than eager's. ``text`` says by how much."""
