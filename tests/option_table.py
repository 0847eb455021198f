"""Write generate.py's options into the README: python tests/option_table.py"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402

BEGIN = "<!-- options: python tests/option_table.py -->\n\n"
END = "\n<!-- end of options -->\n"


def form(action: argparse.Action) -> str:
    """A flag with the form of its value, as --help shows it."""
    flag = ", ".join(action.option_strings)
    if action.nargs == 0:
        return flag
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if action.choices else action.dest.upper())
    return " ".join([flag, *([value] if isinstance(value, str) else value)])


def meaning(action: argparse.Action) -> str:
    """The help text with the default, unless the text has it."""
    if action.default in (None, False) or "default" in action.help:
        return action.help
    return f"{action.help} (default: {action.default})"


def option_table() -> str:
    """A Markdown table for each group of the parser."""
    tables = []
    for group in generate.parser()._action_groups:
        rows = [
            f"| `{form(action)}` | {meaning(action)} |"
            for action in group._group_actions
            if action.dest not in ("help", "version")
        ]
        if rows:
            tables.append("\n".join([f"| {group.title} | |", "|---|---|", *rows]))
    return "\n\n".join(tables) + "\n"


def between_markers(readme: str) -> tuple[str, str, str]:
    """The README before its table, the table, and the rest."""
    before, rest = readme.split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table, END + after


if __name__ == "__main__":
    path = ROOT / "README.md"
    before, _, after = between_markers(path.read_text())
    path.write_text(before + option_table() + after)
