"""Tests of the Spark engine's own behaviour, beyond what every engine must do."""
