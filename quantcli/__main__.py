"""``python -m quantcli``."""

from __future__ import annotations

import gc
import os
import sys


def run() -> None:
    """Entry point of the command ``quantcli``."""
    # Starting up makes no garbage, and looking for it would take 20 ms; a command that works turns it on again.
    gc.disable()
    # typer validates through pydantic, which would search every installed package for plug-ins: 20 ms.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from quantcli.cli.app import main

    sys.exit(main())


if __name__ == "__main__":
    run()
