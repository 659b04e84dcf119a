"""Work on finished runs: open, recommend, export, report, serve; and sweeps of runs."""
