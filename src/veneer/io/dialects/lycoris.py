"""LoRA, LoHa and LoKr as kohya's scripts and LyCORIS name them: one safetensors file, no config.

A key is `<stem>.<piece>`; the stem is a prefix and the module's name with `_` for each dot, which cannot be undone
without knowing the names. `alpha` is a number for each module; the scale is alpha/rank. LyCORIS takes an alpha of 0 for
the rank, and no scale at all for a LoKr whose two factors are whole. `dora_scale` are DoRA's lengths, (out, 1, …).
Keys and shapes are those of LyCORIS 4.1 (lycoris/modules: locon, loha, lokr).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from veneer.io.dialects.hf_base import Inexpressible, way_out, whole_number
from veneer.io.records import Record, Site
from veneer.method import Method, VeneerError
from veneer.methods import DoRA, LoHa, LoKr, LoRA
from veneer.methods.lokr import split

Parts = Mapping[str, Tensor]
Hada = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
Kron = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
#: method → (part of our adapter → piece of the key)
PIECES: dict[type[Method], dict[str, str]] = {
    LoRA: {"A": "lora_down.weight", "B": "lora_up.weight"},
    LoHa: {part: f"hada_{part}" for part in Hada},
    LoKr: {part: f"lokr_{part}" for part in Kron},
}
#: the piece by which a module's method is known
_FIRST = {"lora_down.weight": LoRA, "hada_w1_a": LoHa, "lokr_w1": LoKr, "lokr_w1_a": LoKr}
_COMMON = ("alpha", "dora_scale")
_KNOWN = {*_COMMON, *(piece for pieces in PIECES.values() for piece in pieces.values())}
#: other pieces → what they are
_OTHERS = {
    "lora_mid.weight": "LoRA with a decomposed kernel", "diff": "a change of the whole weight, which needs the base",
    "diff_b": "a change of the bias, which needs the base", "w_norm": "a change of a norm, which needs the base",
    "b_norm": "a change of a norm, which needs the base", "oft_blocks": "OFT or BOFT", "oft_diag": "OFT",
    "scalar": "a trained factor", "a1.weight": "GLoRA", "on_input": "IA³",
}
#: what the parts of a model are called in file names → the first part of a module's name in a pipeline
COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
PREFIXES = (*COMPONENTS, "lycoris")


# -- names --------------------------------------------------------------------------------------------------
def is_dialect(keys: Iterable[str]) -> bool:
    """Whether the keys of a file are of this kind."""
    return any(key.partition(".")[2] in _FIRST or key.partition(".")[2] in _OTHERS for key in keys)


def flat(module: str) -> str:
    return module.replace(".", "_")


def stems_for(modules: Sequence[str], prefix: str | None) -> dict[str, str]:
    """module → stem. prefix: None for that of kohya's files, where the parts of a pipeline (unet.…, text_encoder.…)
    have prefixes of their own.

    Raises `Inexpressible` where two modules would get one stem.
    """
    found: dict[str, str] = {}
    second = any(module.startswith("text_encoder_2.") for module in modules)
    own = {"unet": "lora_unet", "text_encoder": "lora_te1" if second else "lora_te", "text_encoder_2": "lora_te2"}
    for module in modules:
        part, _, rest = module.partition(".")
        if prefix is None and rest and part in own:
            found[module] = f"{own[part]}_{flat(rest)}"
        else:
            found[module] = f"{prefix or 'lora_unet'}_{flat(module)}"
    owners: dict[str, str] = {}
    for module, stem in found.items():
        other = owners.setdefault(stem, module)
        if other != module:
            raise Inexpressible(f"{other!r} and {module!r} would both be {stem!r}")
    return found


def modules_for(stems: Iterable[str], modules: Iterable[str], prefixes: Sequence[str]) -> dict[str, list[str]]:
    """stem → the modules of a base that it may mean; an empty list for one that means none."""
    table: dict[str, list[str]] = {}
    for module in modules:
        part, _, rest = module.partition(".")
        names = {f"{prefix}_{flat(module)}" for prefix in prefixes}
        names |= {f"{prefix}_{flat(rest)}" for prefix, component in COMPONENTS.items() if part == component and rest}
        for name in names:
            table.setdefault(name, []).append(module)
    return {stem: table.get(stem, []) for stem in stems}


def prefixes_of(stems: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The prefixes that each of these stems would have if it were of one of the modules, the shortest first; none where
    there is no such prefix for all."""
    ends = {flat(module) for module in modules}
    fits: set[str] | None = None
    for stem in stems:
        parts = stem.split("_")
        here = {"_".join(parts[:i]) for i in range(1, len(parts)) if "_".join(parts[i:]) in ends}
        fits = here if fits is None else fits & here
    return sorted((prefix for prefix in fits or () if prefix), key=len)


def grouped(tensors: Parts) -> dict[str, dict[str, Tensor]]:
    """stem → piece → tensor. Raises `VeneerError` for pieces that no method here has, saying what they are."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, piece = key.partition(".")
        if piece not in _KNOWN:
            what = _OTHERS.get(piece, "not a part of LoRA, LoHa or LoKr")
            raise VeneerError(f"{key!r} cannot be converted: {what}. Understood are LoRA, LoHa and LoKr: "
                              f"{', '.join(sorted(_KNOWN))}")
        found.setdefault(stem, {})[piece] = tensor
    return found


def without_alpha(groups: Mapping[str, Parts]) -> list[str]:
    """A note on the modules for which the file has no alpha; none where each has one, or needs none."""
    found = [stem for stem, pieces in groups.items()
             if "alpha" not in pieces and not {"lokr_w1", "lokr_w2"} <= set(pieces)]
    if not found:
        return []
    return [f"{len(found)} of {len(groups)} modules ({found[0]!r}) have no alpha in the file: it was taken for the "
            "rank, a scale of 1, as kohya's scripts and LyCORIS take it"]


# -- records → file -----------------------------------------------------------------------------------------
def encode(records: Sequence[Record], sites: Mapping[str, Site], stems: Mapping[str, str],
           methods: Sequence[type[Method]] = (LoRA, LoHa, LoKr)) -> dict[str, Tensor]:
    """Records → tensors by key. sites: by weight name; stems: by module name; methods: those that may be written.

    Raises `Inexpressible` for a weight that these files have no words for.
    """
    found: dict[str, Tensor] = {}
    for record in records:
        site = sites[record.name]
        inner = record.method.inner if isinstance(record.method, DoRA) else record.method
        _refuse(record, inner, site, methods)
        parts = {part.removeprefix("inner."): tensor for part, tensor in record.tensors.items()}
        scale = inner.scale  # type: ignore[attr-defined]
        stem = stems[site.spots[0].module]
        if isinstance(inner, LoRA):
            pieces = _lora_to_file(parts, site)
        else:
            pieces = _shaped(inner, _folded(inner, parts, scale, record.name), site)
        if "magnitude" in parts:
            pieces["dora_scale"] = parts["magnitude"].reshape(-1, *[1] * (len(site.layout.native) - 1))
        pieces["alpha"] = _alpha_tensor(_alpha(inner, parts), record.name)
        found |= {f"{stem}.{piece}": tensor for piece, tensor in pieces.items()}
    return found


def _refuse(record: Record, inner: Method, site: Site, methods: Sequence[type[Method]]) -> None:
    spot = site.spots[0]
    if type(inner) not in methods:
        has = " and ".join(kind.__name__ for kind in methods)
        raise Inexpressible(f"{record.name!r} has {record.method}; these files have {has}"
                            f"{way_out(record.method, with_dora=LoHa in methods)}")
    if isinstance(record.method, DoRA) and LoHa not in methods:
        raise Inexpressible(f"{record.name!r} has {record.method}, and kohya's files have no lengths; LyCORIS's "
                            f"have{way_out(record.method, with_dora=False)}")
    if spot.kind not in ("linear", "conv") or spot.param != "weight" or not spot.module:
        raise Inexpressible(f"{record.name!r} is of kind {spot.kind}; these files adapt linear layers and convolutions")
    if len(site.spots) > 1:
        raise Inexpressible(f"{record.name!r} is tied, and these files adapt each of its places apart")
    odd = [text for text in site.unusual if isinstance(inner, LoRA) or text.partition("=")[0] not in
           ("groups", "dilation")]
    if odd:
        raise Inexpressible(f"{record.name!r} is a convolution with {', '.join(odd)}, on which these files mean "
                            "another change or none")
    if inner.moves_base:
        raise Inexpressible(f"the start of {record.method} rewrote the base weight {record.name!r}, which no file of "
                            "this kind says")
    if isinstance(inner, LoRA) and inner.bias:
        raise Inexpressible(f"{record.name!r} has LoRA(bias=True), and these files have no added bias")


def _lora_to_file(parts: Parts, site: Site) -> dict[str, Tensor]:
    A, B = parts["A"], parts["B"]
    if site.spots[0].kind == "conv":
        A, B = A.reshape(-1, *site.layout.native[1:]), B.reshape(*B.shape, *[1] * (len(site.layout.native) - 2))
    return {"lora_down.weight": A, "lora_up.weight": B}


def _shaped(method: Method, parts: Parts, site: Site) -> dict[str, Tensor]:
    """By the file's names. A whole W₂ of a convolution is (o₂, i₂, *kernel) there, and flat here."""
    kernel = site.layout.shape.kernel
    pieces = PIECES[type(method)]
    found = {pieces[part]: tensor for part, tensor in parts.items() if part != "magnitude"}
    if kernel and "lokr_w2" in found:
        w2 = found["lokr_w2"]
        found["lokr_w2"] = w2.reshape(w2.shape[0], -1, *kernel)
    return found


def _whole(parts: Parts) -> bool:
    return "w1" in parts and "w2" in parts


def _folded(method: Method, parts: Parts, scale: float, name: str) -> Parts:
    """A LoKr of two whole factors has no scale over there: W₁ is multiplied by it, in fp64 where that would round."""
    if not isinstance(method, LoKr) or not _whole(parts) or scale == 1:
        return parts
    w1 = parts["w1"]
    for dtype in (w1.dtype, torch.float64):
        product = w1.to(dtype) * scale
        if scale and torch.equal(unfolded(product, scale, w1.dtype), w1):
            return {**parts, "w1": product}
    raise Inexpressible(f"LyCORIS has no scale for a LoKr of two whole factors, and multiplying {name!r}'s by "
                        f"{scale:g} would round")


def unfolded(w1: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The inverse: in fp64, rounded once."""
    return (w1.double() / scale).to(dtype)


def _alpha(method: Method, parts: Parts) -> float:
    rank, alpha = method.rank, method.alpha  # type: ignore[attr-defined]
    if isinstance(method, LoKr) and _whole(parts):
        return float(rank)
    if isinstance(method, LoRA) and method.rank_stabilized:
        return method.scale * rank
    return float(rank if alpha is None else alpha)


def _alpha_tensor(alpha: float, name: str) -> Tensor:
    """In fp32 where that holds it, else in fp64."""
    if not alpha:
        raise Inexpressible(f"{name!r} has an alpha of 0, which LyCORIS takes for the rank")
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


# -- file → records -----------------------------------------------------------------------------------------
def decode(groups: Mapping[str, Mapping[str, Tensor]], sites: Mapping[str, Site],
           plan: Mapping[str, Method]) -> list[Record]:
    """Tensors by stem and piece → records. sites: of each stem; plan: the methods, where the file is known to be one
    that Veneer wrote and nobody has changed. Raises `VeneerError` for a group that is not whole."""
    records: list[Record] = []
    for stem, pieces in groups.items():
        kind = next((method for piece, method in _FIRST.items() if piece in pieces), None)
        if kind is None:
            raise VeneerError(f"{stem!r} has {', '.join(sorted(pieces))} and nothing that these would belong to")
        site = sites[stem]
        names = {piece: part for part, piece in PIECES[kind].items()}
        parts: Parts = {names[piece]: tensor for piece, tensor in pieces.items() if piece in names}
        strange = sorted(set(pieces) - set(names) - set(_COMMON))
        if strange:
            raise VeneerError(f"{stem!r} has parts of more than one method: {', '.join(strange)} beside "
                              f"{', '.join(sorted(set(pieces) & set(names)))}")
        parts = _lora_from_file(parts, site) if kind is LoRA else _flattened(parts, site)
        method = plan.get(site.name) or _method(kind, stem, pieces, parts, site)
        parts = _unfolded(method, parts)
        if "dora_scale" in pieces:
            lengths = _lengths(pieces["dora_scale"], site, stem)
            parts = {f"inner.{part}": tensor for part, tensor in parts.items()} | {"magnitude": lengths}
        record = Record(site.name, method, dict(parts))
        prefix = "inner." if "dora_scale" in pieces else ""
        record.keys = {prefix + part: f"{stem}.{piece}" for piece, part in names.items()}
        records.append(record)
    return _alike(records, sites.values(), plan)


def _lora_from_file(parts: Parts, site: Site) -> Parts:
    if site.spots[0].kind != "conv":
        return parts
    return {part: tensor.flatten(1) if tensor.dim() == len(site.layout.native) else tensor
            for part, tensor in parts.items()}


def _flattened(parts: Parts, site: Site) -> Parts:
    kernel = site.layout.shape.kernel
    return {part: tensor.flatten(1) if part == "w2" and kernel and tensor.shape[2:] == kernel else tensor
            for part, tensor in parts.items()}


def _unfolded(method: Method, parts: Parts) -> Parts:
    inner = method.inner if isinstance(method, DoRA) else method
    if not isinstance(inner, LoKr) or not _whole(parts) or inner.scale == 1:
        return parts
    return {**parts, "w1": unfolded(parts["w1"], inner.scale, parts["w2"].dtype)}


def _lengths(tensor: Tensor, site: Site, stem: str) -> Tensor:
    if tensor.numel() != site.layout.shape.out or tensor.shape[0] != tensor.numel():
        raise VeneerError(f"'{stem}.dora_scale' is {tuple(tensor.shape)}: lengths of inputs (LyCORIS's "
                          f"wd_on_out=False), and DoRA here has lengths of the outputs of {site.name!r}, "
                          f"{site.layout.shape.out}")
    return tensor.reshape(-1)


def _method(kind: type[Method], stem: str, pieces: Parts, parts: Parts, site: Site) -> Method:
    missing = [PIECES[kind][part] for part in _needed(kind, parts) if part not in parts]
    if missing:
        raise VeneerError(f"{stem!r} is not whole: it has no {' and no '.join(missing)}")
    rank = _rank(kind, parts)
    alpha = float(pieces["alpha"]) if "alpha" in pieces else float(rank)
    if not alpha:
        raise VeneerError(f"'{stem}.alpha' is 0, which LyCORIS takes for the rank and other tools for no change; "
                          "set it in the file")
    inner: Method
    if kind is LoRA:
        inner = LoRA(rank=rank, alpha=whole_number(alpha))
    elif kind is LoHa:
        inner = LoHa(rank=rank, alpha=whole_number(alpha), effective_conv="t1" in parts)
    else:
        inner = LoKr(rank=rank, alpha=None if _whole(parts) else whole_number(alpha), decompose_both="w1_a" in parts,
                     decompose_factor=_factors(parts, site, stem)[0], effective_conv="t2" in parts)
    return DoRA(inner) if "dora_scale" in pieces else inner


def _needed(kind: type[Method], parts: Parts) -> list[str]:
    if kind is LoRA:
        return ["A", "B"]
    if kind is LoHa:
        return [*Hada[:4], *(("t1", "t2") if "t1" in parts or "t2" in parts else ())]
    first = ["w1"] if "w1" in parts else ["w1_a", "w1_b"]
    return first + (["w2"] if "w2" in parts else ["w2_a", "w2_b"])


def _rank(kind: type[Method], parts: Parts) -> int:
    if kind is LoRA:
        return parts["A"].shape[0]
    if kind is LoHa:
        return parts["w1_b"].shape[0]
    if "w2_b" in parts:
        return parts["w2_b"].shape[0]
    if "w1_b" in parts:
        return parts["w1_b"].shape[0]
    return max(1, -(-max(parts["w2"].shape) // 2))  # the least for which both would be trained whole


def _factors(parts: Parts, site: Site, stem: str) -> list[int]:
    """Each `decompose_factor` that splits the weight as the file has it, the default first."""
    positions = torch.Size(site.layout.shape.kernel).numel()
    o1 = (parts["w1"] if "w1" in parts else parts["w1_a"]).shape[0]
    i1 = (parts["w1"] if "w1" in parts else parts["w1_b"]).shape[1]
    out, in_ = site.layout.shape.out, site.layout.shape.in_ // positions
    found = _splits(out, in_, o1, i1)
    if not found:
        raise VeneerError(f"{stem!r}: no decompose_factor splits {out} × {in_} ({site.name!r}) into blocks of which "
                          f"the first factor has {o1} × {i1}")
    return found


@functools.cache
def _splits(out: int, in_: int, o1: int, i1: int) -> list[int]:
    return [factor for factor in (-1, *range(1, max(out, in_) + 1))
            if split(out, factor)[0] == o1 and split(in_, factor)[0] == i1]


def _alike(records: list[Record], sites: Iterable[Site], plan: Collection[str]) -> list[Record]:
    """LoKr's that are not in the plan with one `decompose_factor` where one does for all: PEFT's config has one."""
    where = {site.name: site for site in sites}
    common: set[int] | None = None
    for record in records:
        inner = record.method.inner if isinstance(record.method, DoRA) else record.method
        if isinstance(inner, LoKr) and record.name not in plan:
            parts = {part.removeprefix("inner."): tensor for part, tensor in record.tensors.items()}
            fits = set(_factors(parts, where[record.name], record.name))
            common = fits if common is None else common & fits
    if not common:
        return records
    return [record if record.name in plan else
            dataclasses.replace(record, method=_with_factor(record.method, min(common))) for record in records]


def _with_factor(method: Method, factor: int) -> Method:
    if isinstance(method, DoRA):
        return DoRA(_with_factor(method.inner, factor))
    return dataclasses.replace(method, decompose_factor=factor) if isinstance(method, LoKr) else method
