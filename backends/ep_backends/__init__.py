"""Backends: one package for each engine, importing that engine and `shared` only."""
