"""`python -m benchmarks`: every benchmark, one after another."""

from benchmarks import files, supabase

files.main()
supabase.main()
