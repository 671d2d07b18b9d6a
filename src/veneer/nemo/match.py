"""Which modules a PeftConfig means, by NeMo's rules: full names, `*` for anything, lm_head left alone."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field

from torch import nn

from veneer.hosts import host_of
from veneer.method import VeneerError, VeneerWarning
from veneer.nemo.config import names_of

#: a pattern that has one of these is a regex
_REGEX = frozenset("[](){}|?+\\^$")


def wildcard_match(pattern: str, key: str | None) -> bool | None:
    """Whether the whole name `key` matches; None for a key of None.

    `*` stands for anything, dots included, and all else for itself. A pattern with one of `[](){}|?+\\^$`, or one that
    begins with `.*`, is a regex instead, in which `*` is short for `.*` wherever it is not that already.
    Raises `VeneerError` for what is no regex.
    """
    if key is None:
        return None
    if _REGEX.intersection(pattern) or pattern.startswith(".*"):
        text = re.sub(r"(?<!\.)\*", ".*", pattern)
    else:
        text = ".*".join(map(re.escape, pattern.split("*")))
    try:
        return re.fullmatch(text, key) is not None
    except re.error as error:
        raise VeneerError(f"target_modules: {pattern!r} is no regular expression: {error}") from None


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, in whatever form its weight is held."""
    return isinstance(module, nn.Linear) or host_of(module)[0].is_linear


@dataclass
class ModuleMatcher:
    """As in NeMo AutoModel: what target_modules name; or every linear layer but exclude_modules; or every linear layer.

    is_causal_lm: modules with `lm_head` in their name are left alone.
    Raises `VeneerError` when nothing says what to match, and for targets and exclusions at once.
    """

    target_modules: list[str] | str | None = field(default_factory=list)
    exclude_modules: list[str] | str | None = field(default_factory=list)
    match_all_linear: bool = False
    is_causal_lm: bool = False

    def __post_init__(self) -> None:
        self.target_modules = names_of("target_modules", self.target_modules)
        self.exclude_modules = names_of("exclude_modules", self.exclude_modules)
        if self.match_all_linear:
            for name in ("target_modules", "exclude_modules"):
                if getattr(self, name):
                    warnings.warn(f"match_all_linear=True adapts every linear layer; {name} is not looked at",
                                  VeneerWarning, stacklevel=3)
        elif self.target_modules and self.exclude_modules:
            raise VeneerError("target_modules and exclude_modules cannot be given together: name what to adapt, or "
                              "what of all linear layers to leave alone")
        elif not self.target_modules and not self.exclude_modules:
            raise VeneerError("nothing says what to adapt: give target_modules, exclude_modules or "
                              "match_all_linear=True")

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> bool:
        """Whether the module `m`, called `name` below `prefix`, is meant."""
        full = ".".join(part for part in (prefix, name) if part)
        if self.is_causal_lm and "lm_head" in full:
            return False
        if self.match_all_linear:
            return is_linear(m)
        if self.target_modules:
            return any(wildcard_match(pattern, full) for pattern in self.target_modules)
        return is_linear(m) and not any(wildcard_match(pattern, full) for pattern in self.exclude_modules or ())


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is a causal language model, by the name of its class or what its config says of it."""
    said = getattr(getattr(model, "config", None), "architectures", None)
    return any("CausalLM" in name for name in (type(model).__name__, *(said or ())))
