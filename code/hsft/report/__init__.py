"""Results of runs: result.json, per-user ranks, tables, comparisons and the HTML report."""
