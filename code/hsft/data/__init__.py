"""From CSV files and item caches to batches of integer ids."""
