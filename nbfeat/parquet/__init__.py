"""Features on disk, in Parquet files."""
