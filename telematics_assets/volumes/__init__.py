"""The landing Volume: one protocol (`base.py`) and its stores (`local.py`, `memory.py`)."""
