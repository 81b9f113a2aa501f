"""`jenga plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jenga.models import ModelSpec
    from jenga.plan.report import PlanReport


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command("plan")(plan)


def plan(
    memory: Annotated[str, typer.Option(help="KV memory of one rank, with a unit: 40GiB, 512MB.")],
    model: Annotated[
        str | None, typer.Option(help="A model of the zoo (configs/models) or a description in YAML.")
    ] = None,
    hf_config: Annotated[
        Path | None, typer.Option("--hf-config", help="A Hugging Face model folder, or its config.json.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks (default: the model's).")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="What keys and values are stored as, e.g. fp8.")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="What recurrent states are stored as, e.g. bfloat16.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="A sequence length to fill the buffer with; may be repeated.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=0, help="Image tokens per sequence (default: the model's).")] = None,
    strategy: Annotated[str | None, typer.Option(help="Strategies, separated by commas (default: all).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the comparison into this PNG file.")] = None,
) -> None:
    """Show how each strategy lays out a model's KV memory, how many sequences fit, and what the rest is wasted on."""
    from rich.console import Console

    from jenga.layout import TYPICAL_TOKENS
    from jenga.models import ModelError, check_dtype
    from jenga.plan.report import plan_report
    from jenga.strategies import STRATEGIES, PlanError, require_strategy
    from jenga.units import parse_size

    errors = Console(stderr=True)
    try:
        size = parse_size(memory, "--memory")
        spec = _describe(model, hf_config)
        types = spec.layer_types(tp, check_dtype(kv_dtype, "--kv-dtype"), check_dtype(state_dtype, "--state-dtype"))
        names = [n.strip() for n in strategy.split(",") if n.strip()] if strategy else list(STRATEGIES)
        for name in names:
            require_strategy(name)
        if plot is not None and plot.suffix.lower() != ".png":
            raise ValueError(f"--plot {plot}: only PNG files are written; give a name that ends in .png")
    except (ModelError, PlanError, ValueError) as error:
        errors.print(f"[red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None

    with errors.status(f"{spec.name}: planning"):
        report = plan_report(
            spec.name,
            spec.source,
            types,
            size,
            names,
            sorted(set(tokens or TYPICAL_TOKENS)),
            image_tokens=spec.image_tokens if images is None else images,
            tp=tp or spec.tp,
        )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        from jenga.plan.tables import print_report
        from jenga.terminal import table_console

        print_report(report, table_console())
    if plot is not None:
        _draw(report, plot, errors)
    if all(s.error for s in report.strategies):
        if as_json:
            for failed in report.strategies:
                errors.print(f"[red]error:[/] {failed.error}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _describe(model: str | None, hf_config: Path | None) -> ModelSpec:
    from jenga.hf_config import from_hf_config
    from jenga.models import ModelError, known_models, load_model

    if (model is None) == (hf_config is None):
        raise ModelError(
            f"give either --model or --hf-config, {'not both' if model else 'for example --model gemma-3-27b'}; "
            f"models of the zoo: {', '.join(known_models())}"
        )
    if hf_config is not None:
        return from_hf_config(hf_config)
    assert model is not None
    return load_model(model)


def _draw(report: PlanReport, path: Path, errors: object) -> None:
    from rich.console import Console

    assert isinstance(errors, Console)
    try:
        from jenga.plan.plot import draw

        draw(report, path)
    except ModuleNotFoundError as error:
        errors.print(
            f"[red]error:[/] --plot needs the package '{error.name}'; install the extra 'plot'",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(2) from None
    except OSError as error:
        errors.print(
            f"[red]error:[/] --plot {path}: cannot be written: {error.strerror}", soft_wrap=True, highlight=False
        )
        raise typer.Exit(2) from None
    errors.print(f"drawn: {path}", soft_wrap=True, highlight=False)
