"""The README.md beside an adapter's files, with the facts that the Hugging Face Hub reads out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_card(folder: Path, model: Any) -> None:
    """Write README.md where there is none yet; one that is there is somebody's own."""
    file = folder / "README.md"
    if file.exists():
        return
    config = model.active_peft_config
    base = config.base_model_name_or_path
    method = str(getattr(config.peft_type, "value", config.peft_type))
    tags = [*(["transformers"] if hasattr(model.get_base_model(), "config") else []),
            *(["lora"] if method == "LORA" else []), *([f"base_model:adapter:{base}"] if base else [])]
    facts = ["library_name: peft", *([f"base_model: {base}"] if base else []),
             *(["pipeline_tag: text-generation"] if str(config.task_type).endswith("CAUSAL_LM") else []),
             *(["tags:", *(f"- {tag}" for tag in sorted(tags))] if tags else [])]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["---", *facts, "---", "", f"# A {method} adapter" + (f" of {base}" if base else ""), "",
                      "Saved by Veneer, in the format of Hugging Face PEFT.", ""])
    file.write_text(text, encoding="utf-8")
