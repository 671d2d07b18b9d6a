"""The errors of this front door. All are `VeneerError`, which is a `ValueError`."""

from __future__ import annotations

from veneer.method import VeneerError, VeneerWarning

#: what PEFT calls the base of its own warnings
PeftWarning = VeneerWarning


class PeftError(VeneerError):
    """What PEFT calls the base of its own errors."""


class NoMatchingPeftModuleError(PeftError):
    """A config adapts nothing of the model."""


class NotInVeneerError(VeneerError, NotImplementedError):
    """PEFT has it and Veneer has not; the message names what to use."""


class UnsupportedLayerError(VeneerError, TypeError):
    """A config hits a layer that its method cannot adapt. PEFT raises ValueError or TypeError, depending on the
    method: this is both."""
