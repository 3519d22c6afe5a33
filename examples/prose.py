"""English prose for evaluation without a download: the help texts that come with Python.

Run: python examples/prose.py FILE.txt
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics


def paragraphs() -> list[str]:
    """Paragraphs of running text, one line each, in a fixed order; code and tables are left out."""
    found = []
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            line = " ".join(block.split())
            if len(line) > 80 and re.match(r"[A-Z]", line) and line.endswith((".", ":")):
                found.append(line)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text("\n".join(paragraphs()) + "\n", encoding="utf-8")
