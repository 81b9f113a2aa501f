"""`jenga keys add|list|remove FILE`: API keys of the REST interface."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments import keyring
from deployments.keyring import KeyFileError, KeyRing
from jenga.terminal import table_console

app = typer.Typer(name="keys", help="API keys of the REST interface (docs/security.md).", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="Key file, `auth.keys_file` of the configuration.")]


def _fail(error: KeyFileError) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


@app.command()
def add(
    file: File,
    name: Annotated[str, typer.Argument(help="Name of the key, in lists and messages.")],
    tenant: Annotated[str | None, typer.Option(help="Keys of one tenant share cached prompts. [NAME]")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May see the memory map.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests in a minute.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(min=1, help="Most requests at the same time.")] = None,
) -> None:
    """Make a key and print it, once: only a salted hash is kept. A running deployment knows it a second later."""
    try:
        with keyring.editing(file):
            ring, secret = (keyring.read(file) if file.exists() else KeyRing.new()).add(
                name,
                tenant=tenant,
                admin=admin,
                requests_per_minute=requests_per_minute,
                concurrent_requests=concurrent_requests,
            )
            keyring.write(file, ring)
    except KeyFileError as error:
        raise _fail(error) from None
    Console(stderr=True).print(f"key '{name}' added to {escape(str(file))}; it is shown only now:", highlight=False)
    print(secret)


@app.command(name="list")
def list_keys(
    file: File, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False
) -> None:
    """Show the keys of a file: names, tenants, limits; no secrets."""
    try:
        ring = keyring.read(file)
    except KeyFileError as error:
        raise _fail(error) from None
    shown = [key.model_dump(exclude={"salt", "hash"}) for key in ring.keys]
    if as_json:
        print(json.dumps(shown))
        return
    columns = ("name", "tenant", "admin", "requests_per_minute", "concurrent_requests", "created")
    table = Table(*(column.replace("_", " ") for column in columns))
    for key in shown:
        key["created"] = str(key["created"])[:10]
        table.add_row(*("" if key[column] in (None, False) else str(key[column]) for column in columns))
    table_console().print(table)


@app.command()
def remove(file: File, name: Annotated[str, typer.Argument(help="Name of the key.")]) -> None:
    """Remove a key. A running deployment refuses it a second later."""
    try:
        with keyring.editing(file):
            keyring.write(file, keyring.read(file).remove(name))
    except KeyFileError as error:
        raise _fail(error) from None
    print(f"key '{name}' removed from {file}")
