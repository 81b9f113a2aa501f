"""Pictures of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jenga.simulate.cluster import ClusterResult
from jenga.simulate.report import CAUSES, SimulationResult

COLOURS = {
    "needed": "#2b6cb0",
    "cached": "#90cdf4",
    "tail": "#d6bcfa",
    "padding": "#f6ad55",
    "stranded": "#e53e3e",
    "droppable": "#b7791f",
    "reserved": "#718096",
    "free": "#edf2f7",
    "remainder": "#cbd5e0",
}


def plot(results: Sequence[SimulationResult], folder: Path) -> list[Path]:
    """Write ``memory.png`` (the buffer by cause, over time) and ``resident.png`` into `folder`; their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(
        len(results), 1, figsize=(9, 2.4 * len(results) + 0.8), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, result in zip(axes[:, 0], results, strict=True):
        times = [s.time_s for s in result.samples]
        shares = [[s.bytes_by_cause[c] / result.memory_bytes for s in result.samples] for c in CAUSES]
        axis.stackplot(times, shares, colors=[COLOURS[c] for c in CAUSES], labels=CAUSES)
        axis.set(title=result.strategy, ylim=(0, 1), ylabel="share of buffer")
    axes[-1, 0].set_xlabel("simulated time (s)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(CAUSES), fontsize="small")
    memory = folder / "memory.png"
    figure.savefig(memory, dpi=120)
    pyplot.close(figure)

    figure, axis = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for result in results:
        axis.plot([s.time_s for s in result.samples], [s.running for s in result.samples], label=result.strategy)
    axis.set(xlabel="simulated time (s)", ylabel="requests resident", ylim=(0, None))
    axis.legend()
    resident = folder / "resident.png"
    figure.savefig(resident, dpi=120)
    pyplot.close(figure)
    return [memory, resident]


def plot_routers(results: Sequence[ClusterResult], folder: Path) -> list[Path]:
    """Write ``routers.png`` (tokens recomputed, time to first token, load of each replica) into `folder`; its path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, (tokens, first, load) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    names = [r.router for r in results]
    tokens.bar(names, [r.recomputed_prompt_tokens / 1e6 for r in results], color=COLOURS["needed"])
    tokens.set(title="prompt tokens recomputed (millions)")
    for part, colour in (("p99", "cached"), ("p90", "tail"), ("p50", "needed")):
        first.bar(names, [getattr(r.ttft_s, part) for r in results], color=COLOURS[colour], label=part)
    first.set(title="time to first token (s)")
    first.legend()
    load.boxplot([[n.computed_tokens / 1e6 for n in r.replicas] for r in results])
    load.set_xticks(range(1, len(names) + 1), names)
    load.set(title="tokens computed by a replica (millions)")
    for axis in (tokens, first, load):
        axis.tick_params(axis="x", rotation=30)
        axis.set_ylim(0)
    path = folder / "routers.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return [path]
