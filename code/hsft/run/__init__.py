"""One run: set up, train and rank, its folder, and what is checked before."""
