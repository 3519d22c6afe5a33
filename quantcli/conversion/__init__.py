"""Conversions: from a plan to files that are proven and put in place whole."""
