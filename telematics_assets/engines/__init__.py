"""The engines: one protocol (`base.py`), one module per engine. Engines never import each other."""
