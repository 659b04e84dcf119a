"""Ranking, metrics and the evaluation loop."""
