"""Benchmarks: each prints the ratio of our work to a named floor measured in the same run. They are no tests."""
