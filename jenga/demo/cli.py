"""`jenga demo-model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from jenga.demo.train import Progress


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command("demo-model")(demo_model)


def demo_model(
    name: Annotated[
        str,
        typer.Argument(help="gemma3-recall, granite-hybrid, qwen3-next, gemma4, whisper, or all.", metavar="NAME|all"),
    ],
    out: Annotated[Path, typer.Option(help="Folder that gets one folder per model.")] = Path("var/models"),
    force: Annotated[bool, typer.Option("--force", help="Make it again, replacing what is there.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train gemma3-recall anew instead of using the shipped weights.")
    ] = False,
) -> None:
    """Make a demo model: a small language model with more than one kind of layer, and its tokenizer.

    gemma3-recall (sliding window + full attention) is trained to recall values by key;
    granite-hybrid (Mamba-2 + attention), qwen3-next (GDN + attention), gemma4 (two head sizes) and
    whisper (encoder-decoder) have random weights.
    """
    from jenga.demo import NAMES, RECALL, DemoModelError, make_reporting

    console = Console()
    for each in NAMES if name == "all" else (name,):
        try:
            with console.status(f"{each}: making") as status:

                def follow(step: Progress, each: str = each) -> None:
                    status.update(
                        f"{each}: training, step {step.step}, {step.length} tokens, {step.seconds:.0f} s, "
                        f"{step.accuracy:.1%} of answer tokens right"
                    )

                made = make_reporting(
                    each, out, force=force, train=train and (name != "all" or each == RECALL), progress=follow
                )
        except DemoModelError as error:
            Console(stderr=True).print(f"[red]error:[/] {error}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from None
        size = sum(path.stat().st_size for path in made.path.iterdir()) / 1e6
        state = "kept, complete already" if made.kept else "made"
        console.print(f"{each}: {state}: {made.path} ({size:.1f} MB)", soft_wrap=True, highlight=False)
