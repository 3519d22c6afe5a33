"""Formats: each lays codes out in bits as some runtime reads them. Listed in `quantcli.plugins`."""
