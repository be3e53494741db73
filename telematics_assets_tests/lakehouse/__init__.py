"""Tests of the lakehouse rooms."""
