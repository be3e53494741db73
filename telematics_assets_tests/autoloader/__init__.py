"""Tests of the Auto Loader rooms."""
