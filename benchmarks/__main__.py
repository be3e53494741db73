"""`python -m benchmarks`: every benchmark, one after another."""

from benchmarks.files import main

main()
