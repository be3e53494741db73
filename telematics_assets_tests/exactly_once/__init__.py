"""Tests of the exactly-once promise."""
