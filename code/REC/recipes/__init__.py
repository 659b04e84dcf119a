"""What the programs do, one file a task: cache items, evaluate, fine-tune."""
