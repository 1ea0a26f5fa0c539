"""A hook of mkdocs: puts the help text of every command where a page has `<!-- commands -->`."""

from __future__ import annotations

from typing import Any

import click

from pydetox.cli import cli

MARKER = "<!-- commands -->"
WIDTH = 84


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with the help texts in the place of the marker."""
    return markdown.replace(MARKER, _commands()) if MARKER in markdown else markdown


def _commands() -> str:
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    top = click.Context(cli, info_name="pydetox", **settings)
    parts = [f"## pydetox\n\n```text\n{cli.get_help(top)}\n```"]
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top, **settings)
        parts.append(f"## pydetox {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts)
