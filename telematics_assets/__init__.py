"""telematics_assets: vehicle files and business tables as governed Delta tables, driven by Dagster."""
