"""Start, stop and look at the private Ray: what `jenga serve`, `stop` and `status` do."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape

from deployments import first_answer, keyring, peers, tensor_parallel, tls
from deployments.config import ConfigError, ServeFile, load
from deployments.failures import memory_plan, root_cause
from deployments.first_answer import Answer
from deployments.local import isolation, node, processes, record
from deployments.local.api import ServeApi, State
from deployments.local.ports import PortError, free_ports, listen
from deployments.local.processes import ProcessId
from deployments.local.record import API_KEY, Record
from deployments.local.supervisor import Orders

# Ports inside a network namespace of our own: any will do that the user's own choice leaves free.
_INNER_PORTS = range(20_001, 20_101)
_POLL_S = 0.5
_STOP_S = 25.0


class ServeError(Exception):
    """A start that failed, a stop that did not work; the message is for the user."""


@dataclass(frozen=True)
class Options:
    """What the command line adds to the configuration; None leaves the configuration's value."""

    host: str | None = None
    port: int | None = None
    dashboard_port: int = 8265
    metrics_port: int = 8080
    isolate: bool = True
    timeout: float = 600.0


class Progress:
    """Phases on the terminal: one line each when done, and what is going on meanwhile."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._begin = time.monotonic()

    @contextlib.contextmanager
    def phase(self, title: str) -> Iterator["Progress"]:
        """A phase; its time is printed when it ends well."""
        begin = time.monotonic()
        self._last = ""
        with self.console.status(f"{title} ...") as self._status:
            self._title, self._phase_begin = title, begin
            yield self
        self.console.print(f"[green]done[/] {title} [dim]({time.monotonic() - begin:.1f} s)[/]")

    def tell(self, detail: str) -> None:
        """What the phase is at; without a terminal a line is printed at each change."""
        seconds = time.monotonic() - self._phase_begin
        if self.console.is_terminal:
            self._status.update(f"{self._title}: {escape(detail)} [dim]{seconds:.0f} s[/]")
        elif detail != self._last:
            self.console.print(f"     {escape(detail)} [dim](at {time.monotonic() - self._begin:.0f} s)[/]")
        self._last = detail

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin


def serve(path: Path, options: Options, console: Console, folder: Path) -> Record:
    """Start Ray, deploy the configuration and wait until it answers.

    Raises ConfigError, PortError or ServeError; whatever was started is stopped then.
    """
    progress = Progress(console)
    config = load(path)
    try:
        with record.lock(folder), _terminable():
            return _serve(path, config, options, progress, folder)
    except BlockingIOError:
        raise ServeError(f"another `jenga serve` is starting just now (lock in {folder})") from None


def _serve(path: Path, config: ServeFile, options: Options, progress: Progress, folder: Path) -> Record:
    _refuse_second(folder)
    config = _with_options(config, options)
    http = config.http_options
    _check_gpus(config)
    peers.most()
    sockets = _public_sockets(config, options)
    try:
        isolated, reason = _choose_isolation(options)
        if reason:
            progress.console.print(f"[yellow]note:[/] no namespaces: {escape(reason)}", highlight=False)
        _make_demo_model(config, progress)
        log = folder.parent / "log" / "serve.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # Unix sockets allow 107 characters, of which Ray needs some 70.
        private_dir = tempfile.mkdtemp(prefix="jenga-", dir="/tmp")
        # Ray opens its folder to everybody; the one around it stays this user's.
        ray_dir = str(Path(private_dir) / "ray")
        ports = _node_ports(options, isolated, [sock.getsockname()[1] for sock in sockets])
        if not isolated:
            # Ray itself takes these ports in a moment.
            for sock in sockets:
                sock.close()
            sockets = []
        supervisor = _spawn(config, ports, ray_dir, isolated, sockets, log, folder)
    finally:
        for sock in sockets:
            sock.close()
    running = Record(
        supervisor=supervisor,
        ray_dir=private_dir,
        config=str(path),
        application=config.application.name,
        model=config.application.args.model.id,
        host=http.host,
        port=http.port,
        dashboard_port=options.dashboard_port,
        metrics_port=options.metrics_port,
        isolated=isolated,
        started=time.time(),
        log=str(log),
        certificate=http.ssl_certfile,
    )
    try:
        record.write(folder, running)
        answer = _bring_up(running, config, options, progress)
    except BaseException:
        with _uninterrupted():
            _keep_logs(running, progress.console)
            _end(running, folder)
        raise
    _report(running, answer, progress, shows_memory=config.application.args.memory_map)
    if not isolated:
        _warn_open(progress.console, running)
    return running


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half a deployment."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_second(folder: Path) -> None:
    old = record.read(folder)
    if old is None:
        return
    if old.supervisor.alive():
        raise ServeError(
            f"{old.config} is already served at {old.url} (state in {folder}); end it with `jenga stop` first"
        )
    record.clear(folder, old)


def _with_options(config: ServeFile, options: Options) -> ServeFile:
    """The configuration with the command line's values, and with its paths made absolute."""
    changes = {"host": options.host, "port": options.port}
    http = config.http_options.model_copy(update={k: v for k, v in changes.items() if v is not None})
    app = config.application
    folder = str(Path(app.args.model.path).expanduser().absolute())
    args = app.args.model_copy(update={"model": app.args.model.model_copy(update={"path": folder})})
    if not (Path(folder) / "config.json").is_file() and app.args.model.demo is None:
        state = "has no config.json" if Path(folder).is_dir() else "does not exist"
        name = app.args.model.path
        hub = (
            f"; models of the Hugging Face hub are not downloaded: .venv/bin/hf download {name} --local-dir {name}"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", name)
            else ""
        )
        raise ConfigError(
            f"model.path: the model folder {folder} {state}; put the model there, correct the path, "
            f"or name a demo model in model.demo{hub}"
        )
    tensor_parallel.check(args, Path(folder))
    if http.ssl_certfile is not None and http.ssl_keyfile is not None:
        files = {key: str(Path(getattr(http, key)).expanduser().absolute()) for key in ("ssl_certfile", "ssl_keyfile")}
        tls.check(files["ssl_certfile"], files["ssl_keyfile"])
        http = http.model_copy(update=files)
    if args.auth is not None and args.auth.keys_file is not None:
        keys = Path(args.auth.keys_file).expanduser().absolute()
        try:
            keyring.read(keys)
        except keyring.KeyFileError as error:
            raise ConfigError(f"auth.keys_file: {error}") from None
        args = args.model_copy(update={"auth": args.auth.model_copy(update={"keys_file": str(keys)})})
    return config.model_copy(update={"http_options": http, "applications": [app.model_copy(update={"args": args})]})


def _check_gpus(config: ServeFile) -> None:
    args = config.application.args
    wanted = args.resources.gpus * args.resources.tensor_parallel * args.max_replicas
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if wanted > present:
        raise ConfigError(
            f"resources.gpus: {args.max_replicas} replica(s) need {wanted:g} GPU(s), this machine has {present}; "
            "set resources.gpus to 0 for CPU engines, or serve fewer replicas"
        )


def _public_sockets(config: ServeFile, options: Options) -> list[socket.socket]:
    """Listening sockets for what the user talks to, or PortError before anything is started."""
    http = config.http_options
    wanted = [
        (http.host, http.port, "REST", "--port, or http_options.port in the configuration"),
        ("127.0.0.1", options.dashboard_port, "Ray's dashboard", "--dashboard-port"),
        ("127.0.0.1", options.metrics_port, "metrics", "--metrics-port"),
    ]
    with contextlib.ExitStack() as opened:
        sockets = []
        for place in wanted:
            sock = listen(*place)
            opened.callback(sock.close)
            sockets.append(sock)
        opened.pop_all()
        return sockets


def _choose_isolation(options: Options) -> tuple[bool, str | None]:
    """Whether to use namespaces, and why not."""
    if not options.isolate:
        return False, "--no-isolate was given"
    reason = isolation.why_not()
    return reason is None, reason


def _warn_open(console: Console, running: Record) -> None:
    """Without a network namespace: what listens beyond the loopback."""
    found = "; ".join(processes.open_listeners(running.supervisor.pid)) or "nothing just now"
    console.print(
        "[yellow]warning:[/] Ray has no network namespace of its own. Beyond the loopback listen: "
        f"{escape(found)}. Ray may open more: keep this machine behind a firewall.",
        soft_wrap=True,
        highlight=False,
    )


def _make_demo_model(config: ServeFile, progress: Progress) -> None:
    model = config.application.args.model
    if model.demo is None:
        return
    from jenga import demo

    folder = Path(model.path)
    if model.demo in demo.NAMES and folder.name != model.demo:
        raise ConfigError(
            f"model.path: {folder} must end in /{model.demo}, the demo model's name; correct it, "
            "or remove model.demo to serve a model of your own"
        )
    with progress.phase(f"demo model {model.demo}"):
        try:
            demo.make(model.demo, folder.parent)
        except demo.DemoModelError as error:
            raise ConfigError(f"model.demo: {error}") from None


def _node_ports(options: Options, isolated: bool, public: list[int]) -> node.NodePorts:
    """Ports for Ray's node: free ones here, or any inside a namespace of its own."""
    chosen = ("dashboard", "metrics")
    names = [field.name for field in fields(node.NodePorts) if field.name not in chosen]
    count = len(names)
    inner = [port for port in _INNER_PORTS if port not in public][:count] if isolated else free_ports(count)
    return node.NodePorts(
        dashboard=options.dashboard_port,
        metrics=options.metrics_port,
        **dict(zip(names, inner, strict=True)),
    )


def _logical_cpus(config: ServeFile) -> int:
    """CPUs that Ray is told of: at least what the replicas ask for, since Ray only counts them."""
    args = config.application.args
    asked = args.resources.cpus * args.resources.tensor_parallel * args.max_replicas
    return max(os.cpu_count() or 1, int(asked + 0.999))


def _spawn(
    config: ServeFile,
    ports: node.NodePorts,
    ray_dir: str,
    isolated: bool,
    sockets: list[socket.socket],
    log: Path,
    folder: Path,
) -> ProcessId:
    """Start the supervisor, which outlives this command."""
    listeners = {str(sock.getsockname()[1]): sock.fileno() for sock in sockets}
    orders = Orders(node.command(ports, ray_dir, _logical_cpus(config)), listeners, isolated)
    prefix = isolation.network_command() if isolated else []
    package_root = str(Path(__file__).resolve().parents[2])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", record.SUPERVISOR, orders.to_argument()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=list(listeners.values()),
            env=node.environment(os.environ, ports, package_root) | {record.STATE_DIR: str(folder)},
        )
    identity = ProcessId.of(process.pid)
    if identity is None:
        raise ServeError(f"the supervisor ended at once; see {log}")
    return identity


def _bring_up(running: Record, config: ServeFile, options: Options, progress: Progress) -> Answer | None:
    deadline = time.monotonic() + options.timeout
    api = ServeApi(running.dashboard_url)
    with progress.phase("start a private Ray" if running.isolated else "start Ray"):
        while not api.ready():
            _check_alive(running)
            _check_time(deadline, options, "Ray's dashboard does not answer")
            time.sleep(_POLL_S)
    with progress.phase("hand the application to Ray Serve"):
        inner = config.to_ray()
        if running.isolated:
            # The forwarder decides who may come in; inside there is only the loopback.
            inner["http_options"]["host"] = "127.0.0.1"
        try:
            api.deploy(inner)
        except httpx.HTTPError as error:
            raise ServeError(f"Ray Serve refused the application: {_one_line(str(error))}") from None
    with progress.phase("start the engines") as engines:
        _wait_running(running, api, engines, deadline, options)
    key = None
    if config.application.args.auth is not None and not (key := os.environ.get(API_KEY)):
        progress.console.print(f"[yellow]note:[/] no first request: it would take an API key in ${API_KEY}")
        return None
    with progress.phase("answer a first request"):
        try:
            return first_answer.ask(running.url, config.application.args, key=key, certificate=running.certificate)
        except first_answer.NoAnswerError as error:
            raise ServeError(str(error)) from None


def _wait_running(running: Record, api: ServeApi, progress: Progress, deadline: float, options: Options) -> State:
    while True:
        _check_alive(running)
        with contextlib.suppress(httpx.HTTPError):
            state = api.state(running.application)
            if state.failure:
                raise ServeError(f"the application does not start: {state.failure}")
            if state.running:
                return
            progress.tell(state.summary() or state.status.lower().replace("_", " "))
        _check_time(deadline, options, "the replicas are not ready")
        time.sleep(_POLL_S)


def _check_alive(running: Record) -> None:
    if not running.supervisor.alive():
        lines = Path(running.log).read_text(errors="replace").splitlines()
        reason = root_cause(lines) or next((line for line in reversed(lines) if line.strip()), "no reason")
        raise ServeError(f"Ray ended while starting: {_one_line(reason)}")


def _check_time(deadline: float, options: Options, what: str) -> None:
    if time.monotonic() > deadline:
        raise ServeError(f"{what} after {options.timeout:.0f} s; --timeout allows more")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _logs(running: Record) -> Path:
    """Ray's logs of this deployment, while it runs."""
    return Path(running.ray_dir) / "ray" / "session_latest" / "logs"


def _memory_plan(running: Record) -> str | None:
    """The memory plan as one engine printed it: all are alike."""
    for log in sorted(_logs(running).glob("worker-*.out")):
        if plan := memory_plan(log.read_text(errors="replace").splitlines()):
            return plan
    return None


def _report(running: Record, answer: Answer | None, progress: Progress, *, shows_memory: bool) -> None:
    console = progress.console
    console.print(f"\n[bold green]serving[/] {running.model} after {progress.elapsed:.0f} s\n")
    if plan := _memory_plan(running):
        console.print("memory plan of each replica:")
        console.print(plan + "\n", markup=False, highlight=False, no_wrap=True, overflow="ignore", crop=False)
    if answer is not None:
        console.print(answer.curl(running.url), markup=False, highlight=False, soft_wrap=True)
        console.print(json.dumps(answer.response), markup=False, highlight=False, soft_wrap=True, style="dim")
    if answer is not None and answer.right is not None:
        verdict = "[green]right[/]" if answer.text.strip() == answer.right else "[red]wrong[/]"
        console.print(f"\nthe answer {answer.text!r} is {verdict}: the prompt holds {answer.right!r}", highlight=False)
    console.print(
        f"\nREST       {running.url}/v1\n"
        + (f"memory     {running.memory_url}\n" if shows_memory else "")
        + f"metrics    {running.metrics_url}\n"
        f"dashboard  {running.dashboard_url}\n"
        f"stop       {_this_program()} stop",
        highlight=False,
    )


def _this_program() -> str:
    """`jenga` as this shell finds it: its path when the environment is not on PATH."""
    called = Path(sys.argv[0])
    if called.name != "jenga" or shutil.which("jenga") == str(called.absolute()):
        return "jenga"
    return os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called)


def _keep_logs(running: Record, console: Console) -> None:
    """Ray's logs of a failed start, beside our own; Ray's folder itself is removed."""
    target = Path(running.log).parent / "last-failure"
    shutil.rmtree(target, ignore_errors=True)
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(_logs(running), target)
        console.print(f"[dim]Ray's logs of this start: {escape(str(target))}[/]", highlight=False, soft_wrap=True)


def _end(running: Record, folder: Path) -> None:
    running.supervisor.signal(signal.SIGTERM)
    if not running.supervisor.wait(_STOP_S):
        # Its life line breaks with it, and everything else ends.
        running.supervisor.signal(signal.SIGKILL)
        running.supervisor.wait(_STOP_S)
    record.clear(folder, running)


def stop(folder: Path) -> Record | None:
    """End what the record names; returns it, or None when there was nothing."""
    running = record.read(folder)
    if running is None:
        return None
    with _uninterrupted():
        _end(running, folder)
    return running


def status(folder: Path) -> tuple[Record, State] | None:
    """The record and the application's state; None when nothing runs."""
    running = record.read(folder)
    if running is None or not running.supervisor.alive():
        return None
    try:
        return running, ServeApi(running.dashboard_url, timeout=5).state(running.application)
    except httpx.HTTPError as error:
        return running, State("UNREACHABLE", message=str(error))


__all__ = ["ConfigError", "Options", "PortError", "Record", "ServeError", "State", "serve", "status", "stop"]
