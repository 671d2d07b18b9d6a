"""Patterns → {weight: method}, resolved before anything is touched. Pure: reads the model, changes nothing."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.hosts import Host, Layout
from veneer.hosts.parameter import ParameterHost
from veneer.hosts.swap import has_own_forward
from veneer.method import Method, Shape, VeneerError, VeneerWarning, nearest
from veneer.storage import unreadable
from veneer.weights import Place, Weight, base_modules, foreign, is_lazy, scan

Pattern = str | re.Pattern | Callable[[str, nn.Module], bool]
Rules = Method | Mapping[Any, Method | None]
#: what is known of each weight before it is adapted: statistics by weight name, then by their own names
Evidence = Mapping[str, Mapping[str, Tensor]]

_LAZY = "which has no shape yet: run a forward pass first"
_NO_LAYOUT = Layout.of(torch.empty(0))
_RESERVED = frozenset(dir(nn.ModuleDict()))
_OURS = ("adapters", "veneer")

def _lazy_hits(model: nn.Module, pattern: Any) -> list[str]:
    """Names that `pattern` hits among the parameters of lazy modules, which have no shape before their first call."""
    found = []
    for module_name, module in base_modules(model):
        if any(map(is_lazy, module._parameters.values())):
            for param in module._parameters:
                full = f"{module_name}.{param}" if module_name else param
                names = (module_name, full) if param == "weight" else (full,)
                place = Place(module_name, module, param, ParameterHost, _NO_LAYOUT, names)
                found += [full] if _hits(pattern, place) else []
    return found


@dataclass(eq=False)
class PlanEntry:
    """One weight, the method for it, the rule that said so, and its trainable parameters. given: the adapter's values
    come from elsewhere (a file), so that nothing is started from the base weight or from statistics."""

    weight: Weight
    method: Method
    pattern: str
    parameters: int
    given: bool = False

    @property
    def name(self) -> str:
        return self.weight.name


@dataclass(eq=False)
class Plan:
    """What `attach` would do. `str(plan)` is a table; `warnings` are sentences."""

    entries: list[PlanEntry]
    base_parameters: int
    excluded: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    adaptable: int = 0
    shared_parameters: int = 0

    @property
    def trainable_parameters(self) -> int:
        return sum(entry.parameters for entry in self.entries) + self.shared_parameters

    def __str__(self) -> str:
        groups: dict[tuple[str, Method], list[PlanEntry]] = defaultdict(list)
        for entry in self.entries:
            groups[(entry.pattern, entry.method)].append(entry)
        rows = [("pattern", "weights", "method", "trainable")]
        rows += [(pattern, str(len(group)), str(method), f"{sum(e.parameters for e in group):,}")
                 for (pattern, method), group in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((r[0].ljust(widths[0]), r[1].rjust(widths[1]), r[2].ljust(widths[2]),
                            r[3].rjust(widths[3]))).rstrip() for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        if self.shared_parameters:
            lines.append(f"and {self.shared_parameters:,} that weights share")
        share = 100 * self.trainable_parameters / max(self.base_parameters, 1)
        matrices = sum(not entry.weight.layout.shape.is_vector for entry in self.entries)
        lines.append(f"{matrices} of {self.adaptable} adaptable matrices"
                     + (f" and {len(self.entries) - matrices} vectors, " if matrices < len(self.entries) else ", ") +
                     f"{self.trainable_parameters:,} trainable parameters "
                     f"({share:.3f}% of the base's {self.base_parameters:,})")
        if self.excluded:
            lines.append("left alone: " + ", ".join(self.excluded[:6]) + (" …" if len(self.excluded) > 6 else ""))
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def plan(model: nn.Module, rules: Rules) -> Plan:
    """Resolve `rules` against `model`; touches nothing.

    rules: a method (every linear weight but the output head), or a mapping from patterns to a method or None
    (= leave alone); later patterns win. A pattern is a name in which `*` stands for anything, dots included;
    a compiled regex that must match a whole name; or a callable (name, module) → bool. Names are those of
    `named_parameters()`, or a module's name for its weight.

    Raises `VeneerError` when a pattern hits nothing, when a method cannot adapt what it was given, or when
    rules disagree about a tied weight. Warns (`VeneerWarning`) of uneven coverage of like-named weights.
    """
    return plan_warning(model, rules)


def plan_warning(model: nn.Module, rules: Rules) -> Plan:
    """`plan` for a function of the API to call: its warnings point at the line that called that function."""
    made = resolve(model, scan(model), rules)
    for text in made.warnings:
        warnings.warn(text, VeneerWarning, stacklevel=3)
    return made


def resolve(model: nn.Module, weights: list[Weight], rules: Rules) -> Plan:
    """The plan for already scanned weights."""
    chosen, excluded = _bare(model, weights, rules) if isinstance(rules, Method) else _mapped(model, weights, rules)
    for weight, (method, pattern) in chosen.items():
        _check(weight, method, pattern)
    settled = _settled(chosen)
    entries = [PlanEntry(weight, settled[method], pattern, _count(weight, settled[method]))
               for weight, (method, pattern) in chosen.items()]
    base = sum(weight.numel() for weight in weights)
    names = [weight.name for weight in excluded]
    adaptable = sum(not weight.layout.shape.is_vector for weight in weights)
    texts = _lazy(model, rules) + _unread(model, rules) + _uneven(weights, set(chosen), set(excluded))
    return Plan(entries, base, names, texts, adaptable, sum(map(_shared_count, dict.fromkeys(settled.values()))))


def _settled(chosen: Mapping[Weight, tuple[Method, str]]) -> dict[Method, Method]:
    """Each method with what depends on all of its weights filled in."""
    groups: dict[Method, dict[str, Shape]] = defaultdict(dict)
    for weight, (method, _) in chosen.items():
        groups[method][weight.name] = weight.layout.shape
    return {method: method.settle(shapes) for method, shapes in groups.items()}


def portioned(made: Plan, statistics: Evidence | None) -> Plan:
    """The plan with each weight's own part of what the statistics of all of them give (ranks, say)."""
    groups: dict[Method, list[PlanEntry]] = defaultdict(list)
    for entry in made.entries:
        if entry.method.needs is not None and not entry.given:
            groups[entry.method].append(entry)
    if not groups:
        return made
    parts: dict[str, Method | None] = {}
    for method, entries in groups.items():
        missing = [e.name for e in entries if e.name not in (statistics or {})]
        if missing:
            hint = nearest(missing[0], statistics) if statistics else ""
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise VeneerError(f"{method} starts from statistics ({method.needs}), and there are none of "
                              f"{missing[0]!r}{more}{hint}. Collect them first: statistics = veneer.calibrate(model, "
                              "batches, rules); veneer.attach(model, rules, statistics=statistics)")
        assert statistics is not None
        parts |= method.portioned({e.name: statistics[e.name] for e in entries})
    entries = []
    for entry in made.entries:
        part = parts.get(entry.name, entry.method)
        if part is not None:
            entries.append(PlanEntry(entry.weight, part, entry.pattern, _count(entry.weight, part), entry.given))
    left = [entry.name for entry in made.entries if parts.get(entry.name, entry.method) is None]
    return replace(made, entries=entries, excluded=made.excluded + left)


def _shared_count(method: Method) -> int:
    """The trainable parameters that all weights of a settled method share."""
    with torch.device("meta"):
        shared = method.shared(torch.float32)
    return 0 if shared is None else sum(p.numel() for p in shared.parameters())


def _lazy(model: nn.Module, rules: Rules) -> list[str]:
    """What the rules would hit if it had a shape."""
    patterns = ["*"] if isinstance(rules, Method) else [p for p, method in rules.items() if method is not None]
    names = list(dict.fromkeys(name for pattern in patterns for name in _lazy_hits(model, pattern)))
    return [f"left alone: {', '.join(names[:3])}{' …' if len(names) > 3 else ''} of a lazy module, {_LAZY}"] \
        if names else []


def _unread(model: nn.Module, rules: Rules) -> list[str]:
    """What a bare method passes by because it cannot be read."""
    texts = [text for *_, text in foreign(model)] if isinstance(rules, Method) else []
    return [f"left alone: {texts[0]}" + (f"; and {len(texts) - 1} more" if texts[1:] else "")] if texts else []


def _bare(model: nn.Module, weights: list[Weight], method: Method) -> tuple[dict, list[Weight]]:
    linear = [w for w in weights if w.is_linear]
    chosen: dict[Weight, tuple[Method, str]] = {w: (method, "(every linear weight)") for w in linear if not w.is_head}
    if not chosen:
        for *_, unread in foreign(model):
            raise VeneerError(f"the model has no linear weight besides its output head that can be read: {unread}")
        raise VeneerError(f"the model has no linear weight besides its output head; adaptable here: "
                          f"{_examples(weights)}. Name what to adapt: {{pattern: method}}")
    return _with_biases(weights, chosen), [w for w in linear if w.is_head]


def _mapped(model: nn.Module, weights: list[Weight], rules: Mapping) -> tuple[dict, list[Weight]]:
    if not isinstance(rules, Mapping) or not rules:
        raise VeneerError(f"rules must be a method or a non-empty mapping {{pattern: method or None}}, got {rules!r}")
    chosen: dict[Weight, tuple[Method, str]] = {}
    said: dict[Weight, dict[int, tuple[Method | None, str]]] = defaultdict(dict)
    index = _by_name(weights)
    for pattern, method in rules.items():
        if method is not None and not isinstance(method, Method):
            raise VeneerError(f"rule {_text(pattern)!r}: expected a method such as LoRA(rank=8) or None, "
                              f"got {method!r}")
        hits = 0
        reason = None
        whole = isinstance(pattern, str) and "*" not in pattern
        for weight in index.get(pattern, ()) if whole else weights:
            for number in _places_hit(pattern, weight):
                reason = method.refusal(weight.layout.shape) if method and weight.layout.shape.is_vector else None
                if reason is None:
                    hits += 1
                    said[weight][number] = (method, _text(pattern))
        if not hits:
            raise VeneerError(_foreign_hit(model, pattern)
                              or no_hit(pattern, weights, reason, _lazy_hits(model, pattern)))
    excluded = []
    for weight in weights:
        if weight not in said:
            continue
        answers = {method for method, _ in said[weight].values()}
        if len(answers) > 1:
            what = "; ".join(f"{weight.places[i].names[0]!r}: {m}" for i, (m, _) in said[weight].items())
            raise VeneerError(f"{_tie(weight)} are one tensor, and the rules disagree about it ({what}). Give both "
                              "the same method, or untie them first by assigning a clone of the weight to one")
        method, pattern = next(iter(said[weight].values()))
        if method is None:
            excluded.append(weight)
        else:
            chosen[weight] = (method, pattern)
    if not chosen:
        raise VeneerError("the rules adapt nothing: every weight they hit ends at None")
    return _with_biases(weights, chosen, set(excluded)), excluded


def _by_name(weights: list[Weight]) -> dict[str, list[Weight]]:
    """The weights by every name that one of their places has: rules for thousands of weights name each of them."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        for name in dict.fromkeys(name for place in weight.places for name in place.names):
            found.setdefault(name, []).append(weight)
    return found


def _with_biases(weights: list[Weight], chosen: dict, but: frozenset | set = frozenset()) -> dict:
    """Add the bias of the same module where the method covers it and no rule spoke of it."""
    by_name = {name: w for w in weights for place in w.places for name in place.names}
    out = {}
    for weight, (method, pattern) in chosen.items():
        out[weight] = (method, pattern)
        place = weight.places[0]
        bias = by_name.get(f"{place.module_name}.bias" if place.module_name else "bias")
        spoken = bias is None or bias in chosen or bias in but
        if method.covers_bias and place.param == "weight" and bias is not None and not spoken:
            out[bias] = (method, pattern)
    return out


def _text(pattern: Any) -> str:
    if isinstance(pattern, str):
        return pattern
    return pattern.pattern if isinstance(pattern, re.Pattern) else getattr(pattern, "__name__", repr(pattern))


def _foreign_hit(model: nn.Module, pattern: Any) -> str | None:
    """Why a pattern hits nothing, where it names a layer that is held in a form nothing here reads."""
    for name, module, reason in foreign(model):
        place = Place(name, module, "weight", ParameterHost, _NO_LAYOUT, (name, f"{name}.weight"))
        if _hits(pattern, place):
            return reason
    return None


def hits(pattern: Any, weight: Weight) -> bool:
    """Whether a pattern names this weight by any of its places."""
    return bool(_places_hit(pattern, weight))


def _places_hit(pattern: Any, weight: Weight) -> list[int]:
    return [i for i, place in enumerate(weight.places) if _hits(pattern, place)]


def _hits(pattern: Any, place: Place) -> bool:
    if isinstance(pattern, str):
        if "*" not in pattern:
            return pattern in place.names
        pattern = re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)
    if isinstance(pattern, re.Pattern):
        return any(pattern.fullmatch(name) for name in place.names)
    if callable(pattern):
        return bool(pattern(place.names[0], place.module))
    raise VeneerError(f"a pattern is a string, a compiled regex or a callable (name, module) → bool, got {pattern!r}")


def no_hit(pattern: Any, weights: list[Weight], reason: str | None = None, lazy: Sequence[str] = ()) -> str:
    """The message for a pattern that hits nothing. reason: why what it hits cannot be adapted; lazy: names without a
    shape that it hits."""
    text = _text(pattern)
    if reason is not None:
        return f"{text!r} matches only vectors: {reason}"
    if lazy:
        return f"{text!r} matches only {lazy[0]!r} of a lazy module, {_LAZY}"
    message = f"no adaptable weight matches {text!r}"
    if isinstance(pattern, str):
        message += _nearest_weight(text, weights)
    elif isinstance(pattern, re.Pattern):
        message += " (a regex must match the whole name)"
    count = sum(not w.layout.shape.is_vector for w in weights)
    return f"{message}. Adaptable here: {count} weights, such as {_examples(weights)}; see veneer.plan(model, …)"


def _nearest_weight(text: str, weights: list[Weight]) -> str:
    names = [name for w in weights for place in w.places for name in place.names]
    tail = next((part for part in reversed(re.split(r"[.*]", text)) if part), text)
    parts = Counter(part for name in set(names) for part in name.split("."))
    near = difflib.get_close_matches(tail, [p for p in parts if not p.isdigit()], n=1, cutoff=0.5)
    if not near:
        return ""
    like = [name for name in names if near[0] in name.split(".")]
    best = min(like, key=len)
    return f"; nearest: {best!r} ({len(set(like))} like it)"


def _examples(weights: list[Weight]) -> str:
    return ", ".join(repr(w.name) for w in weights if not w.layout.shape.is_vector) if len(weights) < 4 else \
        ", ".join(repr(w.name) for w in [w for w in weights if not w.layout.shape.is_vector][:3])


def _tie(weight: Weight) -> str:
    return " and ".join(repr(place.names[0]) for place in weight.places)


def _check(weight: Weight, method: Method, pattern: str) -> None:
    if weight.storage is None:
        unfit = unreadable(weight.tensor, weight.name)
        if unfit is not None:
            raise VeneerError(unfit)
    reason = method.refusal(weight.layout.shape)
    if reason is None and any(place.layout.turned(weight.layout) for place in weight.places):
        reason = f"{_tie(weight)} are one tensor but laid out differently"
    hosts = {place.host for place in weight.places}
    if reason is None and method.uses_input and not all(h.has_input for h in hosts):
        reason = "its forward uses the weight directly, so there is no input to drop from; use dropout=0"
    if reason is None and method.adds_bias and not all(h.has_bias for h in hosts):
        reason = "this kind of layer has no bias to add to; use bias=False"
    for place in weight.places:
        reason = reason or place.refusal or place.host.refusal(place.module)
        if reason is None and place.param in _RESERVED:
            reason = f"its name {place.param!r} is taken by an attribute of nn.ModuleDict; rename the parameter"
        if reason is None and not isinstance(place.module, Host) and any(hasattr(place.module, n) for n in _OURS):
            reason = f"its module has an attribute of its own among {', '.join(_OURS)}, which Veneer needs on it"
        if reason is None and has_own_forward(place.module):
            reason = "this instance has a forward of its own that hides its class's; adapt it before it is wrapped"
    if reason is not None:
        raise VeneerError(f"{type(method).__name__} cannot adapt {weight.name!r} (rule {pattern!r}): {reason}")


_COUNTS: dict[tuple, int] = {}


def _count(weight: Weight, method: Method) -> int:
    key = (method, weight.layout.shape)
    if key not in _COUNTS:
        with torch.device("meta"):
            adapter = method.build(weight.layout.shape, torch.float32)
        _COUNTS[key] = sum(p.numel() for p in adapter.parameters())
    return _COUNTS[key]


def _uneven(weights: list[Weight], chosen: set[Weight], excluded: set[Weight]) -> list[str]:
    """Like-named weights (equal but for numbers between dots) of which some are adapted and some just not hit."""
    groups: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight not in excluded and not weight.layout.shape.is_vector:
            groups[re.sub(r"(?<![^.])\d+(?![^.])", "#", weight.name)].append(weight)
    texts = []
    for name, group in groups.items():
        missed = [w for w in group if w not in chosen]
        if missed and len(missed) < len(group):
            texts.append(f"{len(group) - len(missed)} of {len(group)} weights named {name!r} are adapted; not "
                         f"{missed[0].name!r}" + (f" and {len(missed) - 1} more" if len(missed) > 1 else "")
                         + " (a rule with None says that this is meant)")
    return texts
