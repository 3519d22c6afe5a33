"""What a user can ask for, one file for each command."""
