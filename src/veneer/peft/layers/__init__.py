"""Faces over the engine's hosts: what PEFT's layers show, by the same names."""
