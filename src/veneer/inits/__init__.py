"""Initialisers: plain functions that fill a factor pair."""

from veneer.inits.random import FACTOR_INITS, init_factors

__all__ = ["FACTOR_INITS", "init_factors"]
