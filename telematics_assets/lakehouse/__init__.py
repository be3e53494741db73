"""The lakehouse: names to Delta tables, appends with their position in one commit, history. Pure: no Dagster."""
