"""Converting a checkpoint to another."""
