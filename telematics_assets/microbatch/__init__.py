"""Micro-batches of PostgreSQL tables: what changed since a position, in bounded memory, without losing a row."""
