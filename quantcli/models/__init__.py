"""Loading and running any MODEL."""
