"""Tests of the engines' own behaviour, beyond what every engine must do."""
