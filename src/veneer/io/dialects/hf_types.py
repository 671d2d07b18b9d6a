"""All kinds of files that Veneer shares with PEFT, by `peft_type` and by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.io.dialects.hf_adalora import ADALORA
from veneer.io.dialects.hf_base import FileType
from veneer.io.dialects.hf_lora import LoraFiles
from veneer.io.dialects.hf_tables import LOHA, LOKR, RANDLORA, VBLORA, VERA
from veneer.method import Method, VeneerError, nearest
from veneer.methods import LoRA

LORA = LoraFiles()
FAMILIES = (LOHA, LOKR, VERA, VBLORA, RANDLORA, ADALORA)
TYPES: dict[str, FileType] = {LORA.peft_type: LORA, **{family.peft_type: family for family in FAMILIES}}
OF_METHOD: dict[type[Method], FileType] = {LoRA: LORA, **{family.method: family for family in FAMILIES}}


def file_type(config: Mapping[str, Any]) -> FileType:
    """The kind of file that a config announces. Raises `VeneerError` for one that Veneer does not read."""
    name = str(config.get("peft_type", LORA.peft_type))
    if name not in TYPES:
        raise VeneerError(f"adapter_config.json: peft_type is {name!r}{nearest(name, TYPES) or '.'} Veneer reads "
                          f"{', '.join(TYPES)}, each with modules_to_save")
    return TYPES[name]
