"""What a run reads is made here: item caches, imported checkpoints, prepared data sets."""
