"""`jenga demo-model`."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
