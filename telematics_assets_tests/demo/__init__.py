"""Tests of the simulated fleet and the demo."""
