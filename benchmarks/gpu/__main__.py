"""Entry point: `python -m benchmarks.gpu correctness|throughput|report|calibrate|sanitize`.

Needs one CUDA GPU with about 60 GiB and vLLM 0.32 with Jenga (`make install FLAVOUR=gpu`).  Weights are random.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu import calibrate, correctness, report, sanitize, throughput

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder for results (JSON) and scratch files.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only these models.")]


def environment(out: Path) -> None:
    """What this machine is, as JSON beside the results."""
    if shutil.which("nvidia-smi") is None:
        raise typer.BadParameter("there is no nvidia-smi here: this needs a machine with an NVIDIA GPU and its driver")
    import torch
    import vllm

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    made = {
        "gpu": driver.stdout.strip(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
    }
    (out / "environment.json").write_text(json.dumps(made, indent=1) + "\n")
    print(made, flush=True)


@app.command("correctness")
def correctness_(
    out: Out = Path("results/gpu"),
    model: Models = None,
    case: Annotated[list[str] | None, typer.Option(help="Only cases with this in their name, e.g. V1.")] = None,
    engines: Annotated[int, typer.Option(help="Engines that share the GPU at a time.")] = 8,
) -> None:
    """The same tokens as stock vLLM, small models, counted; exit status 1 if a case shows a fault."""
    environment(out)
    if correctness.timed(out, model or [], case or [], engines):
        raise typer.Exit(1)


@app.command("throughput")
def throughput_(
    out: Out = Path("results/gpu"),
    model: Models = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only these: jenga, stock, ...")] = None,
    repeats: int = 3,
    compiled: Annotated[bool, typer.Option(help="torch.compile as well as CUDA graphs (minutes of start-up).")] = True,
    profile: Annotated[bool, typer.Option(help="Also trace 20 steps of each workload.")] = False,
    until: Annotated[float, typer.Option(help="Seconds after which no further engine is started.")] = 1e9,
    trace: Annotated[Path | None, typer.Option(help="Mooncake's conversation trace, to ask its requests too.")] = None,
    fill: Annotated[bool, typer.Option(help="Compile for all engines at once before the first is measured.")] = True,
) -> None:
    """Requests resident, tokens per second and latencies, one engine at a time."""
    environment(out)
    throughput.run(out, model or [], contender or [], repeats, compiled, profile, until, trace, fill)


@app.command("report")
def report_(
    out: Out = Path("results/gpu"),
    plot: Annotated[Path | None, typer.Option(help="Also draw this picture (needs matplotlib).")] = None,
) -> None:
    """The figures of a run of `throughput` as a table in Markdown; needs no GPU."""
    rows = json.loads(measured_in(out).read_text())
    print(report.markdown(rows), end="")
    if plot is not None:
        report.plot(rows, plot)


def measured_in(folder: Path) -> Path:
    """The file of a run of `throughput`; a clear word if there is none."""
    file = folder / "throughput.json"
    if not file.exists():
        raise typer.BadParameter(f"{folder} holds no throughput.json; run `throughput` first, or name its folder")
    return file


@app.command("calibrate")
def calibrate_(
    out: Out = Path("results/gpu"),
    measured: Annotated[
        Path | None, typer.Option(help="Folder of the run of `throughput` [default: the same as --out].")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="The trace that it had, to simulate that as well.")] = None,
) -> None:
    """Fit `jenga simulate` to a run of `throughput` and compare it with that; needs no GPU."""
    folder = measured or out
    measured_in(folder)
    out.mkdir(parents=True, exist_ok=True)
    try:
        calibrate.run(out, folder, trace)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("sanitize")
def sanitize_(
    out: Out = Path("results/gpu"),
    model: Annotated[str, typer.Option(help="Which small model.")] = "falcon-h1-34b",
    limit: Annotated[float, typer.Option(help="Seconds that it may take.")] = 1200,
) -> None:
    """A short run under compute-sanitizer; exit status 1 if it finds something."""
    environment(out)
    try:
        clean = sanitize.run(out, model, limit)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    if not clean:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
