"""Tests of Volumes, tables and the exactly-once promise in object stores: real servers on loopback."""
