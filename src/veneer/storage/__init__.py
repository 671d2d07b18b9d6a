"""How a weight is stored: read as dense, written back if that is safe. One optional library per file."""

from veneer.storage.dense import Dense, storage_of

__all__ = ["Dense", "storage_of"]
