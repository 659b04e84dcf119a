"""Small helpers that know nothing of recommendation: errors, files, logging, environment."""
