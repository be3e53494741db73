"""Dagster assets: the landing folders and the bronze tables.

Belongs here: one module per kind of source, asset keys, and how the package's errors look to Dagster. An asset body
resolves what it needs, calls one function of an engine and returns a result.
Does not belong here: data logic (`engines/`), how reports become metadata (`metadata.py`), when anything runs
(`automation.py`).

https://docs.dagster.io/guides/build/assets
"""
