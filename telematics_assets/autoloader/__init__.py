"""Auto Loader: files of a Volume become rows of a table, incrementally and exactly once. Pure: no Dagster."""
