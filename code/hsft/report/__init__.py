"""What a run leaves behind: result.json, per-user ranks, and tables."""
