"""Names of methods and tasks, at PEFT's place."""

from __future__ import annotations

from veneer.peft.types import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
