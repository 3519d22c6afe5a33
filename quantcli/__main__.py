"""``python -m quantcli``."""

import sys


def run() -> None:
    """Entry point of the command ``quantcli``."""
    from quantcli.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
