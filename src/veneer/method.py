"""The ground of the package: errors, `Shape`, the abstract classes, and the registry of methods.

A *method* is a frozen config that says what the new weight is. An *adapter* is the `nn.Module` that holds
one method's parameters for one weight; what many adapters share (a vector bank, random bases) is a *shared
state*. None of them ever sees a module of the base model: a weight reaches them as a matrix of shape
(*batch, out, in).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from veneer.forms import Form


class VeneerError(ValueError):
    """Bad input: the message says what, where, what was possible, and the nearest match."""


class OptionError(VeneerError, TypeError):
    """An option that a method does not have."""


class VeneerWarning(UserWarning):
    """Something legal that is probably not what was meant."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or an empty string when nothing known comes near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtype they are given, whatever autocast surrounds it."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Shape:
    """A weight as a matrix of `out` rows and `in_` columns, `batch` of them for fused experts.

    A convolution is flattened to (out, in/groups · kernel) with its `kernel` size kept here; an embedding
    is (vocabulary, width), as it is stored; a vector is (n, 1). `lookup` marks an embedding: its rows are
    looked up, so that what the layer puts out are the matrix's columns, not its rows.
    """

    out: int
    in_: int
    batch: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    is_vector: bool = False
    lookup: bool = False

    @property
    def matrix(self) -> tuple[int, ...]:
        return (*self.batch, self.out, self.in_)


def seeded_generator(key: str) -> torch.Generator:
    """A CPU generator seeded by a text: the same bits on every device and rank."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Shared(nn.Module):
    """State that all adapters of one method in one `attach` share: trained, or frozen and made from a seed.

    A subclass creates it in `__init__` and fills it in `reset`. The adapter of the plan's first weight owns it
    (it is a submodule there, by the name `shared`); the others only know it, so that it is moved, trained and
    saved once. Frozen tensors are non-persistent buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed_key = ""

    def reset(self) -> None:
        """Fill parameters and buffers, from `seeded_generator` or a seed of the method's own."""
        raise NotImplementedError(f"{type(self).__name__} must define reset")

    def on_meta(self) -> bool:
        return any(t.is_meta for t in (*self.parameters(), *self.buffers()))

    def initialise(self) -> None:
        if not self.on_meta():
            with torch.no_grad():
                self.reset()

    def progress(self) -> dict[str, Tensor]:
        """What a training run must keep, beside the parameters, to go on bit for bit; not part of the adapter."""
        return {}

    def resume(self, progress: Mapping[str, Tensor]) -> None:
        """Take up what `progress` gave."""

    def notes(self) -> list[str]:
        """Sentences about the state of training that whoever saves the adapter should read."""
        return []

    def advance(self, step: int) -> bool:
        """Do what is due after optimizer step `step`, for a loop that tells of its steps by hand; False where nothing
        ever is."""
        return False

    def _apply(self, fn: Callable, recurse: bool = True) -> Shared:
        was_meta, before = self.on_meta(), dict(self._buffers)
        super()._apply(fn, recurse)
        if was_meta and not self.on_meta():  # `to_empty` after an attach on the meta device
            self.initialise()
            return self
        for name, old in before.items():  # a cast of the model must not round what a seed stands for
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class NewBase(NamedTuple):
    """What a base weight becomes where a start moves a part of it into the adapter: `matrix` (*batch, out, in), and the
    same in packed form (an encoded matrix of `veneer.storage`), where it is to be held so."""

    matrix: Tensor
    packed: Any = None


class Adapter(nn.Module):
    """One method's parameters for one weight W (*batch, out, in).

    `new_weight` is the definition; everything else is a way to the same result that must agree with it.

    A subclass creates its parameters in `__init__`, fills them in `reset_parameters` (data-free) and, when
    they depend on the base weight, in `start`, which it announces with `needs_weight = True`.
    """

    needs_weight: bool = False
    #: fresh from `attach`, the new weight is W itself
    identity_at_start: ClassVar[bool] = True
    #: `gain` or a form's making reads W in every forward
    reads_weight: ClassVar[bool] = False

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.dropout_on = "input"  # or "output": of what the adapter puts out, elements are dropped
        self.method: Method | None = None  # what this was built from, set by `attach`
        self.seed_key = ""
        self.pending = False  # `start` still owed, because the weight was on the meta device
        #: this weight's statistics by name, there until a method that `needs` them is started
        self.evidence: Mapping[str, Tensor] | None = None
        self.remark = ""  # what the start has to say about this weight, for a warning
        self._cache: dict[str, Any] = {}

    # -- what a method defines ------------------------------------------------------------------------
    def reset_parameters(self) -> None:
        """Fill the parameters that do not depend on W, from `self.generator()` where they are random."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def start(self, weight: Tensor) -> NewBase | None:
        """Fill the parameters that depend on W (*batch, out, in); returns what the base weight is to become, or None
        where it stays. Only called when `needs_weight`."""
        return None

    def delta(self) -> Tensor:
        """ΔW (*batch, out, in), differentiable."""
        form = self.form()
        if form is None:
            raise VeneerError(f"{type(self).__name__} is not additive: it has a new_weight but no delta")
        return form.dense()

    def new_weight(self, weight: Tensor) -> Tensor:
        """The adapted weight (*batch, out, in), in the wider of W's and the adapter's dtype."""
        return weight + self.delta()

    # -- shortcuts a method may have ------------------------------------------------------------------
    def form(self, dtype: torch.dtype | None = None) -> Form | None:
        """ΔW as factors or as a Kronecker product, or None when it has no such form or none that pays.

        dtype: in which it will be applied. Large parts may be made in it; None: in the parameters' own.
        """
        return None

    def gain(self, weight: Tensor, form: Form | None = None) -> Tensor | None:
        """A factor for every output of W + ΔW, or None; fp32 or wider, since it lies close to 1.

        Outputs are rows (out,), or columns (in,) where `shape.lookup`. form: what `form()` gave, if it was asked.
        """
        return None

    def row_values(self) -> tuple[Tensor, Tensor] | None:
        """Distinct row numbers (n,) and the values (n, in) that new_weight puts there, all other rows being W's
        own, or None. Spares a lookup the new weight."""
        return None

    def bias_delta(self) -> Tensor | None:
        """What this adapter adds to the layer's bias (out,), or None."""
        return None

    # -- what an optimizer may want to know -------------------------------------------------------------
    def fast_parameters(self) -> list[str]:
        """Names of the parameters on the side of the outputs (LoRA's B), which LoRA+ gives a larger learning rate;
        empty where there are no two sides."""
        return []

    # -- what happens to ΔW in training only ------------------------------------------------------------
    def keep(self) -> Tensor | None:
        """A factor for ΔW in one training forward, drawn anew by each call: for every output (out,), or (in,) where
        `shape.lookup`, or for all of it (1,). None where nothing is ever dropped."""
        return None

    def dropped_weight(self, weight: Tensor, keep: Tensor) -> Tensor:
        """`new_weight` with ΔW multiplied by `keep`."""
        return weight + self.delta() * self._over_outputs(keep)

    def _over_outputs(self, factor: Tensor) -> Tensor:
        return factor.unsqueeze(-2 if self.shape.lookup else -1)

    # -- what is shared, what is saved ------------------------------------------------------------------
    def use(self, shared: Shared) -> None:
        """Know the shared state without owning it: not registered as a submodule here."""
        self.__dict__["_shared"] = shared

    def own_shared(self) -> None:
        """Become the one of the adapters in whose parameters and buffers the shared state is counted."""
        self.shared = self.__dict__["_shared"]

    def shared_state(self) -> Shared | None:
        """What this adapter shares with others, whether it owns it or not."""
        return self.__dict__.get("_shared")

    def packed(self) -> dict[str, Tensor]:
        """The tensors that are saved, by name, without those of the shared state."""
        return {key: tensor for key, tensor in self.state_dict().items() if not key.startswith("shared.")}

    def packed_shared(self) -> dict[str, Tensor]:
        """What is saved of the shared state, by name; it goes with the first weight of each method."""
        state = self.shared_state()
        if state is None:
            return {}
        return {f"shared.{key}": tensor for key, tensor in state.state_dict().items() if key != "_extra_state"}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values that `packed` and perhaps `packed_shared` gave. Parameters stay the objects they are."""
        own = {key: tensor for key, tensor in tensors.items() if not key.startswith("shared.")}
        state = self.shared_state()
        if state is not None and len(own) < len(tensors):
            ours = {k.removeprefix("shared."): t for k, t in tensors.items() if k not in own}
            state.load_state_dict({**state.state_dict(), **ours})
        theirs = {key: tensor for key, tensor in self.state_dict().items() if key.startswith("shared.")}
        self.load_state_dict({**own, **theirs})

    def progress(self) -> dict[str, Tensor]:
        """What a training run must keep, beside the plain form (`Method.plain`) in which the adapter is saved, to go on
        bit for bit."""
        return {}

    def resume(self, progress: Mapping[str, Tensor]) -> None:
        """Take up what `progress` gave."""

    # -- shared machinery -----------------------------------------------------------------------------
    def generator(self) -> torch.Generator:
        """A CPU generator seeded by (seed, weight name): the same bits on every device and rank."""
        return seeded_generator(self.seed_key)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Read by transformers' `save_pretrained`: one adapter on a tied weight has two names there, and may."""
        return {key: key for key, _ in self.named_parameters()}

    def on_meta(self) -> bool:
        return any(p.is_meta for p in self.parameters())

    def initialise(self, weight: Tensor | None) -> NewBase | None:
        """First values, now or (for what needs a weight that is not there yet) at the first use; what `start` gave."""
        self.pending = self.needs_weight
        if self.on_meta():
            return None
        with torch.no_grad():
            self.reset_parameters()
            if self.needs_weight and weight is not None and not weight.is_meta:
                self.pending = False
                return self.start(weight.detach())
        return None

    def _apply(self, fn: Callable, recurse: bool = True) -> Adapter:
        was_meta = self.on_meta()
        super()._apply(fn, recurse)
        if was_meta and not self.on_meta():  # `to_empty` after an attach on the meta device
            self.initialise(None)
        return self

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(prefix + key in state_dict for key in self._parameters):
            self.pending, self.evidence = False, None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # what can be computed again is neither copied nor saved


@dataclass(frozen=True)
class Need:
    """What a start asks of `veneer.calibrate`.

    kind: the statistic: "inputs", "covariance", "gradient". directions: how many of the leading ones of a weight to
    keep (components of its inputs, singular triplets of its gradient). used: how many of them the pair is made of;
    the pass over the data may end once each of these has a cosine above `tau` with what it was a batch before.
    """

    kind: str
    directions: int = 0
    used: int = 0
    tau: float = 1.0


class Part:
    """A frozen description that a method has among its options: its start, say."""

    def to_config(self) -> Any:
        """Plain, JSON-ready data that the method takes for an equal part."""
        raise NotImplementedError(f"{type(self).__name__} must define to_config")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A description of what the new weight is. Never acts, never sees a module.

    Subclasses are frozen dataclasses registered with `@register("name")`.
    """

    key: ClassVar[str] = ""
    #: a bias of the same module is covered too when a rule names the module (a trained head, say)
    covers_bias: ClassVar[bool] = False
    #: options that say how to train, not what the saved tensors mean
    training_only: ClassVar[tuple[str, ...]] = ("dropout", "init", "dtype")
    #: the new weight is W + ΔW with a ΔW that does not depend on W, so that DoRA may wrap it
    additive: ClassVar[bool] = True

    def __new__(cls, *args: Any, **options: Any) -> Method:
        """Before a dataclass says "unexpected keyword argument": what option was meant."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                meant = _ELSEWHERE.get(name)
                hint = f"; it is {meant!r} here." if meant in known else nearest(name, known) or "."
                raise OptionError(f"{cls.__name__} has no option {name!r}{hint} Options: {', '.join(known)}")
        return super().__new__(cls)

    def __str__(self) -> str:
        """The method with those options that differ from their defaults."""
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Method):
                parts.append(str(value))
            elif f.name == "rank" or value != f.default:
                parts.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def settle(self, shapes: Mapping[str, Shape]) -> Method:
        """This method with what depends on all the weights it is put on (name → shape) filled in.

        What is saved is the settled method: it must not depend on other weights any more.
        """
        return self

    def scheduled(self, steps: int) -> Method:
        """This method for a training run of so many optimizer steps, where it follows a schedule."""
        return self

    def shared(self, dtype: torch.dtype) -> Shared | None:
        """New state, not yet filled, that all weights with this settled method in a plan share, or None.

        dtype: of the first of these weights.
        """
        return None

    @property
    def needs(self) -> str | None:
        """The statistic of `veneer.calibrate` that it starts from, or None."""
        return None

    @property
    def need(self) -> Need | None:
        """That statistic in detail."""
        return None if self.needs is None else Need(self.needs)

    @property
    def moves_base(self) -> bool:
        """Its start may rewrite the base weight."""
        return False

    def portioned(self, evidence: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Method | None]:
        """What each weight gets, by name, given the statistics of all weights with this method; None = nothing."""
        return dict.fromkeys(evidence, self)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> Adapter:
        """The adapter for one weight, parameters allocated on the current default device, not yet filled.

        `dtype` is the adapter's default (fp32 over a 16-bit base, else the base's); `shared` is what
        `shared()` returned for this plan, and None where only the parameters are to be counted.
        """
        raise NotImplementedError

    def describe(self, tensors: Mapping[str, Tensor]) -> str:
        """What one weight's saved tensors show of it that the method does not say, in a few words, or nothing."""
        for f in dataclasses.fields(self):
            inner, prefix = getattr(self, f.name), f"{f.name}."
            if isinstance(inner, Method):
                return inner.describe({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        return ""

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[Method, Mapping[str, Tensor]]:
        """The same change with nothing but what is trained, for the files of other tools: a method and its tensors,
        from what `Adapter.packed` gave."""
        return self, tensors

    def regained(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """What `Adapter.packed` gave, out of its own or plain `tensors`, for an adapter of this method that holds `own`
        now; None where that one began elsewhere."""
        return tensors

    def unmoved(self) -> Method:
        """The method that gives the tensors of `Adapter.packed` their meaning on the base as it was, before a start
        moved a part of it; itself where there is none."""
        return self

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """The method from plain options by name; raises `VeneerError` on an unknown one, naming the nearest."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in fields:
                hint = nearest(name, fields) or "."
                raise VeneerError(f"method {cls.key!r} has no option {name!r}{hint} Options: {', '.join(fields)}")
        try:
            return cls(**options)
        except TypeError as error:
            raise VeneerError(f"method {cls.key!r}: {error}") from None

    @property
    def uses_input(self) -> bool:
        """The adapter needs the layer's input, not only its weight (dropout on the input, say)."""
        return False

    @property
    def adds_bias(self) -> bool:
        """The adapter adds to the layer's bias."""
        return False

    def refusal(self, shape: Shape) -> str | None:
        """Why this method cannot adapt such a weight, or None when it can."""
        return "a vector has no low-rank change; use Full()" if shape.is_vector else None


#: names of options in PEFT, NeMo and ModelOpt, and their own names here
_ELSEWHERE = {"r": "rank", "dim": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora":
              "rank_stabilized", "init_lora_weights": "init", "init_weights": "init", "lora_bias": "bias",
              "lora_dtype": "dtype", "projection_prng_key": "seed", "save_projection": "save_bases"}
M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}


def register(key: str) -> Callable[[M], M]:
    """Class decorator: make a method known by `key` to config files and saved adapters."""

    def add(cls: M) -> M:
        if key in _REGISTRY and _REGISTRY[key].__qualname__ != cls.__qualname__:
            raise VeneerError(f"method {key!r} is already registered by {_REGISTRY[key].__qualname__}")
        cls.key = key
        _REGISTRY[key] = cls
        return cls

    return add


def method_names() -> list[str]:
    """The registered method names, sorted."""
    return sorted(_REGISTRY)


def method_class(key: str) -> type[Method]:
    """The config class registered as `key`; `VeneerError` with the nearest name otherwise."""
    if key not in _REGISTRY:
        known = method_names()
        raise VeneerError(f"unknown method {key!r}{nearest(key, known) or '.'} Known: {', '.join(known)}")
    return _REGISTRY[key]


def method_to_dict(method: Method) -> dict[str, Any]:
    """A plain, JSON-ready dict from which `method_from_dict` makes an equal method."""
    out: dict[str, Any] = {"method": method.key}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method):
            value = method_to_dict(value)
        elif isinstance(value, Part):
            value = value.to_config()
        elif isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        elif isinstance(value, tuple):
            value = list(value)
        out[field.name] = value
    return out


def method_from_dict(config: Mapping[str, Any]) -> Method:
    """Rebuild a method from `{"method": key, field: value, …}`; fields left out take their defaults.

    Raises `VeneerError` on an unknown method or field, naming the nearest.
    """
    values = dict(config)
    key = values.pop("method", None)
    if not isinstance(key, str):
        raise VeneerError(f"a method needs a key 'method' with one of: {', '.join(method_names())}; got {config!r}")
    for name, value in values.items():
        if isinstance(value, Mapping) and "method" in value:
            values[name] = method_from_dict(value)
        elif name == "dtype" and isinstance(value, str):
            values[name] = parse_dtype(value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return method_class(key).from_options(values)


def parse_dtype(text: str) -> torch.dtype:
    """`"bfloat16"` or `"torch.bfloat16"` → `torch.bfloat16`."""
    value = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise VeneerError(f"unknown dtype {text!r}; use float32, bfloat16, float16 or float64")
    return value


def check_positive_int(owner: str, field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise VeneerError(f"{owner}: {field} must be a whole number of at least 1, got {value!r}")


def check_probability(owner: str, field: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or math.isnan(value) or not 0 <= value < 1:
        raise VeneerError(f"{owner}: {field} must be at least 0 and below 1, got {value!r}")
