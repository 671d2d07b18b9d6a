"""Adapter files: save, load, and the formats they speak."""
