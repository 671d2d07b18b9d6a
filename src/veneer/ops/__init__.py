"""The arithmetic: reference, fused, and the one place that chooses between them."""

from veneer.ops.dispatch import Choice, choose, linear, onto, use
from veneer.ops.term import Term

__all__ = ["Choice", "Term", "choose", "linear", "onto", "use"]
