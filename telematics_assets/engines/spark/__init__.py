"""The Spark engine: the platform on local Spark, on any cluster by its master, or behind Spark Connect.

Belongs here: everything that knows pyspark. It is imported inside functions only, so that loading costs nothing.
Does not belong here: other engines, Dagster.
"""
