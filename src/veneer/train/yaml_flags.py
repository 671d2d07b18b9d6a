"""What `veneer train` takes beside a YAML file, for whoever must tell it from other flags."""

from __future__ import annotations

YAML_FLAGS = ("--set", "--dry-run", "--resume", "--print-schema")
