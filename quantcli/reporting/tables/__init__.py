"""A report's tables, command by command."""
