"""What an adapter's files hold, whatever format they are in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from veneer.io.records import BaseMap, Record

#: formats by name → what their files are
FORMATS = {
    "native": "veneer.safetensors and veneer.json",
    "peft": "Hugging Face PEFT's directory",
    "nemo": "NeMo AutoModel's directory",
    "modelopt": "a directory of veneer.modelopt, with a directory for the adapter in it",
    "kohya": "one safetensors file with LoRA, as kohya's scripts write it",
    "lycoris": "one safetensors file with LoRA, LoHa or LoKr, as LyCORIS writes it",
}
#: of a tensor file's header: settings of front doors, which travel with an adapter through other formats
META_NEMO, META_MODELOPT, META_STEMS = "veneer.nemo", "veneer.modelopt", "veneer.stems"


@dataclass
class Content:
    """One adapter. base: where its weights sit; about: the base, for manifests; header: what its tensor file's header
    takes along; config: PEFT's, where it was read from PEFT's files."""

    records: list[Record]
    base: BaseMap
    seed: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
