"""`jenga serve`, `jenga stop`, `jenga status`."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
