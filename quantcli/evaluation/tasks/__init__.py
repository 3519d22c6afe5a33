"""What outputs are judged by, one file for each task."""
