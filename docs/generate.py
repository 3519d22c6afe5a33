"""The reference of the command line, written from the code itself: one page per command, and one of all names.

Run: python docs/generate.py       (tests/cli/test_docs.py fails where the pages are not what this writes)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from quantcli.cli.app import main
from quantcli.cli.choices import CHOICES
from quantcli.cli.commands import app
from quantcli.cli.help import help_rows

FOLDER = Path(__file__).parent / "reference"
_NOTE = "<!-- Written by docs/generate.py from the code; change it there. -->"
_FAMILIES = {
    "scheme": "Schemes (`--scheme`)",
    "algorithm": "Algorithms (`--algorithm`)",
    "format": "Formats (`--format`)",
    "target": "Targets (`--target`)",
    "task": "Tasks (`--task`)",
    "method": "Ranges (`--method`)",
    "rest": "What is not quantized (`--rest`)",
    "device": "Devices (`--device`)",
    "verify": "How artifacts are proven (`--verify`)",
}


def pages() -> dict[str, str]:
    """The text of every page, by its file name."""
    overview: Any = typer.main.get_command(app)
    root = overview.make_context("quantcli", [], resilient_parsing=True)
    written = {f"{name}.md": _command_page(name, command, root) for name, command in overview.commands.items()}
    commands = [(f"[`quantcli {name}`]({name}.md)", command.help) for name, command in overview.commands.items()]
    statuses = " ".join((main.__doc__ or "").split("\n\n")[1].split()).rstrip(".").split("; ")
    names = [(family, ", ".join(f"`{name}`" for name in CHOICES[key]())) for key, family in _FAMILIES.items()]
    options = help_rows(overview, root)["Reports"]
    parts = [
        "# The command line", _NOTE, overview.help, _table(("Command", "What it does"), commands),
        _table(("Option of quantcli itself", "What it does"), [(f"`{name}`", text) for name, text in options]),
        "## Exit status", _table(("Status", "Meaning"), [tuple(status.split(" ", 1)) for status in statuses]),
        "## Names", _table(("What", "Known"), names),
        "A MODEL, DATA and a task can be functions of your own as well: `package.module:function`. A recipe can state "
        "any scheme, and chain algorithms.",
    ]  # fmt: skip
    return {"README.md": "\n\n".join(parts) + "\n"} | written


def _command_page(name: str, command: Any, root: Any) -> str:
    context = command.make_context(name, [], parent=root, resilient_parsing=True)
    usage = f"quantcli {name} {' '.join(command.collect_usage_pieces(context))}"
    parts = [f"# quantcli {name}", _NOTE, command.help, f"```\n{usage}\n```"]
    for group, rows in help_rows(command, context).items():
        parts += [f"## {group}", _table(("Option", "Meaning"), [(f"`{option}`", text) for option, text in rows])]
    return "\n\n".join([*parts, "## Examples", f"```\n{command.epilog}\n```"]) + "\n"


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.md"):
        stale.unlink()
    for file, page in pages().items():
        (FOLDER / file).write_text(page, encoding="utf-8", newline="\n")
