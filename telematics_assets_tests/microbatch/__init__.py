"""Tests of the micro-batch rooms."""
