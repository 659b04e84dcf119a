"""What is done with finished runs: open, recommend, export, report, serve, sweep."""
