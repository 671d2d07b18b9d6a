"""Read-only reports on a model and its adapters."""
