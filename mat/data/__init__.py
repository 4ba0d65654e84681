"""Data sets: text from the hub or local Parquet, tokens, masks."""
