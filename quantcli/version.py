"""The version, alone in its file so that it can be read without importing anything."""

from __future__ import annotations

__version__ = "0.1.0"
