"""`veneer merge`: the base model with an adapter merged into it, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import veneer
from veneer.io.checkpoint import parse_size
from veneer.io.checkpoint_names import quantised
from veneer.io.folder import check_free_name, new_folder
from veneer.method import VeneerError
from veneer.train.model import checkpoint_folder, load_model, load_structure
from veneer.train.serve import of_base
from veneer.train.settings import ModelSettings

_NAME = "default"
_OWNER = "veneer merge"


def merge_to_folder(settings: ModelSettings, arguments: argparse.Namespace) -> Path:
    """Write the merged model; the folder appears whole or not at all. Raises `VeneerError`.

    A model of safetensors files is merged file by file, without being loaded. One from files of another kind, or one
    whose weights are held in fewer bits, is loaded and merged in memory.
    """
    output = Path(arguments.output)
    _check_output(output, arguments.overwrite)
    parse_size(arguments.max_shard_size, f"{_OWNER}: --max-shard-size")
    folder = of_base(checkpoint_folder, settings, arguments) if settings.quantize is None else None
    if folder is None or quantised(folder) is not None:
        _in_memory(settings, arguments, output)
    else:
        _by_files(folder, settings, arguments, output)
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise VeneerError(f"--output {str(output)!r} is there already and is not empty; --overwrite replaces it")
    check_free_name(output, f"{_OWNER}: --output", overwrite)


def _by_files(folder: Path, settings: ModelSettings, arguments: argparse.Namespace, output: Path) -> None:
    loaded = of_base(load_structure, settings, arguments)

    def finish(written: Path) -> None:
        loaded.tokenizer.save_pretrained(written)
        loaded.model.generation_config.save_pretrained(written)  # type: ignore[operator, union-attr]

    report = veneer.merge_checkpoint(
        folder, arguments.adapter, output, dtype=None if settings.dtype == "auto" else settings.dtype,
        max_shard_size=arguments.max_shard_size, overwrite=arguments.overwrite, model=loaded.model, finish=finish,
        progress=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    print(report, file=sys.stderr)


def _with_bias(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(getattr(module, "bias", None), Tensor)]


def _in_memory(settings: ModelSettings, arguments: argparse.Namespace, output: Path) -> None:
    loaded = of_base(load_model, settings, arguments)
    model: Any = loaded.model
    known = _with_bias(model)
    veneer.load(model, arguments.adapter, name=_NAME)
    veneer.merge(model, _NAME, keep=False)
    veneer.detach(model)
    added = [name for name in _with_bias(model) if name not in known]
    if added:
        raise VeneerError(f"{_OWNER}: the adapter adds a bias to {added[0]!r}, and the model has none there, so that "
                          "it would be lost on loading; keep the adapter in its own file")
    veneer.dequantize(model)  # what no adapter lies on
    size = {} if arguments.max_shard_size is None else {"max_shard_size": parse_size(arguments.max_shard_size, _OWNER)}
    with new_folder(output, _OWNER, arguments.overwrite) as folder:
        model.save_pretrained(folder, **size)
        loaded.tokenizer.save_pretrained(folder)
