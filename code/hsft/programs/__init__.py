"""Programs: each module parses a command line, calls the package and prints; `PROGRAMS` lists them."""
