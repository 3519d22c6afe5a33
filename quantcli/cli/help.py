"""Help of commands: options in groups, choices from the registries, examples at the end; nothing is cut off."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from quantcli.cli.choices import choices_text

#: Groups of options, in the order in which they are shown; options without one come last.
MODEL, WRITE, BUDGET, WORK, REPORTS = "Model and data", "What to write", "Budgets", "How to work", "Reports"
GROUPS = (MODEL, WRITE, BUDGET, WORK, REPORTS)


def help_rows(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Arguments and options of a command with their help, by group."""
    groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            # Older versions of typer escape brackets, though nobody renders them.
            text = record[1].replace("\\[", "[").replace("x>=", "at least ")
            text = text.replace("{choices}", choices_text(parameter.name))
            # Newer versions of typer put the type behind the name of an argument.
            name = parameter.metavar if parameter.param_type_name == "argument" else record[0]
            groups[getattr(parameter, "rich_help_panel", None) or REPORTS].append((name, text))
    return {group: rows for group, rows in groups.items() if rows}


class GroupedCommand(TyperCommand):
    """A command whose options are shown in groups, and whose epilog holds examples, a line each."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command's name: options that are needed, then arguments as they are named in help."""
        arguments = (parameter for parameter in self.params if parameter.param_type_name == "argument")
        return [self.options_metavar or "", *(str(argument.metavar) for argument in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups, one column of names wide."""
        groups = help_rows(self, ctx)
        width = max(len(name) for rows in groups.values() for name, _ in rows)
        for group, rows in groups.items():
            with formatter.section(group):
                for name, text in rows:
                    # Unlike typer's own lists, no name is broken at its hyphens.
                    room = formatter.width - formatter.current_indent - width - 2
                    first, *others = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
                    for left, right in ((name, first), *(("", line) for line in others)):
                        formatter.write(f"{'':{formatter.current_indent}}{left:{width}}  {right}\n")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are, to be copied."""
        with formatter.section("Examples"):
            for example in (self.epilog or "").splitlines():
                formatter.write(f"  {example}\n")


class Overview(TyperGroup):
    """All commands with a whole sentence each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence of every command, however long it is."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, f"{(self.commands[name].help or '').partition('.')[0]}.") for name in self.commands]
            )
