"""quantcli."""
