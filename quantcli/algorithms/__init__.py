"""Algorithms: each chooses the codes of a weight. One file each, listed in `quantcli.plugins`."""
