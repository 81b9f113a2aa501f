"""What a local deployment is made of: process identities, records, ports, forwarder, life line."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deployments.local import launch, record
from deployments.local.api import read_state
from deployments.local.forwarder import forward
from deployments.local.node import NodePorts, command, environment
from deployments.local.ports import PortError, free_ports, listen
from deployments.local.processes import ProcessId
from deployments.local.record import Record

PORTS = NodePorts(*range(1, 12))


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def a_record(supervisor: ProcessId, tmp_path: Path) -> Record:
    ray_dir = tmp_path / "ray"
    ray_dir.mkdir(exist_ok=True)
    return Record(
        supervisor,
        str(ray_dir),
        "c.yaml",
        "jenga",
        "m",
        "127.0.0.1",
        8000,
        8265,
        8080,
        True,
        1.0,
        str(tmp_path / "log"),
    )


def test_a_process_is_itself_until_it_ends(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessId.of(sleeper.pid)
    assert identity is not None
    assert identity.alive()
    sleeper.kill()
    sleeper.wait()
    assert not identity.alive()
    assert identity.wait(0)


def test_a_recycled_process_id_is_not_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessId.of(sleeper.pid)
    assert identity is not None
    for stranger in (replace(identity, started=identity.started - 1), replace(identity, boot="another boot")):
        assert not stranger.alive()
        stranger.signal(signal.SIGKILL)
    assert sleeper.poll() is None


def test_a_zombie_does_not_live() -> None:
    process = subprocess.Popen(["true"])
    time.sleep(0.3)
    assert ProcessId.of(process.pid) is None
    process.wait()


def test_records_are_read_back_and_nonsense_is_none(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessId.of(sleeper.pid)
    assert identity is not None
    folder = tmp_path / "run"
    written = a_record(identity, tmp_path)
    record.write(folder, written)
    assert record.read(folder) == written
    (folder / record.NAME).write_text('{"supervisor": 3}')
    assert record.read(folder) is None
    assert record.read(tmp_path / "nowhere") is None


def test_stop_ends_the_recorded_process_and_nothing_else(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        identity = ProcessId.of(sleeper.pid)
        assert identity is not None
        written = a_record(identity, tmp_path)
        record.write(tmp_path, written)
        assert launch.stop(tmp_path) == written
        assert sleeper.wait(5) == -signal.SIGTERM
        assert bystander.poll() is None
        assert not Path(written.ray_dir).exists()
        assert launch.stop(tmp_path) is None
        assert launch.status(tmp_path) is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_record_of_a_dead_process_is_cleared_without_a_signal(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    identity = ProcessId.of(sleeper.pid)
    assert identity is not None
    record.write(tmp_path, a_record(replace(identity, started=1), tmp_path))
    assert launch.status(tmp_path) is None
    launch.stop(tmp_path)
    assert sleeper.poll() is None
    assert record.read(tmp_path) is None


def test_the_lock_admits_one(tmp_path: Path) -> None:
    with record.lock(tmp_path), pytest.raises(BlockingIOError), record.lock(tmp_path):
        pass
    with record.lock(tmp_path):
        pass


def test_a_port_in_use_is_named_with_the_option_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=rf"port {port} \(REST\) is in use on 127\.0\.0\.1; .*--port"):
            listen("127.0.0.1", port, "REST", "--port")


def test_an_address_that_is_not_here_is_named() -> None:
    with pytest.raises(PortError, match=r"cannot be opened on 192\.0\.2\.1"):
        listen("192.0.2.1", 8000, "REST", "--port")


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_the_forwarder_passes_both_ways_and_ends_half_by_half() -> None:
    async def scenario() -> bytes:
        async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.read()).upper())
            writer.close()

        inner = await asyncio.start_server(shout, "127.0.0.1", 0)
        outer = await forward(socket.create_server(("127.0.0.1", 0)), inner.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection(*outer.sockets[0].getsockname())
        writer.write(b"x" * 300_000)
        writer.write_eof()
        answer = await reader.read()
        for server in (inner, outer):
            server.close()
        return answer

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == b"X" * 300_000


def test_a_connection_to_nobody_ends() -> None:
    async def scenario() -> bytes:
        outer = await forward(socket.create_server(("127.0.0.1", 0)), free_ports(1)[0])
        reader, _ = await asyncio.open_connection(*outer.sockets[0].getsockname())
        return await reader.read()

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == b""


# A family that tries to stay: a child in its own session that ignores SIGTERM, orphaned at once.
FAMILY = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 61' &) ; sleep 62"


def family_of(init: subprocess.Popen[bytes]) -> list[psutil.Process]:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        members = psutil.Process(init.pid).children(recursive=True)
        if {"61", "62"} <= {part for member in members for part in member.cmdline()}:
            return members
        time.sleep(0.05)
    raise AssertionError("the family did not come up")


@pytest.mark.parametrize("how", ["closed", "parent killed"])
def test_the_first_process_ends_everything_when_its_life_line_breaks(how: str) -> None:
    read, write = os.pipe()
    init = subprocess.Popen([sys.executable, "-m", "deployments.local.init", "sh", "-c", FAMILY], stdin=read)
    os.close(read)
    try:
        members = family_of(init)
        if how == "closed":
            os.close(write)
        else:
            # Closing is what the kernel does for a killed supervisor: let another process hold the line and die.
            holder = subprocess.Popen(["sleep", "60"], pass_fds=[write])
            os.close(write)
            holder.kill()
            holder.wait()
        init.wait(10)
        assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    finally:
        with contextlib.suppress(ProcessLookupError):
            init.kill()


def test_the_first_process_hands_on_the_exit_code() -> None:
    line = [sys.executable, "-m", "deployments.local.init", "sh", "-c", "exit 7"]
    with subprocess.Popen(line, stdin=subprocess.PIPE) as init:
        assert init.wait(20) == 7


def test_ray_is_told_every_port_and_keeps_to_itself() -> None:
    line = command(PORTS, "/tmp/x", 2)
    assert line[line.index("--dashboard-host") + 1] == "127.0.0.1"
    assert line[line.index("--temp-dir") + 1] == "/tmp/x"
    assert "--block" in line
    outer = {"RAY_ADDRESS": "other:6379", "RAY_AUTH_MODE": "token", "PATH": "p", "PYTHONPATH": "mine"}
    inner = environment(outer, PORTS, "/src")
    assert inner["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_ADDRESS" not in inner
    assert inner["PATH"] == "p"
    assert inner["PYTHONPATH"] == "/src:mine"
    assert inner["RAY_USAGE_STATS_ENABLED"] == "0"
    assert inner["FORWARDED_ALLOW_IPS"] == "", "or anybody could say who he is"
    own = {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    assert environment(outer | own, PORTS, "/src").items() >= own.items()


def details(status: str, message: str = "", app_message: str = "") -> dict:
    replicas = [
        {"replica_id": "r1", "state": "RUNNING", "pid": 5, "start_time_s": 1.0},
        {"replica_id": "r2", "state": "STARTING"},
    ]
    engine = {"target_num_replicas": 2, "message": message, "replicas": replicas}
    return {"applications": {"jenga": {"status": status, "message": app_message, "deployments": {"Engine:m": engine}}}}


def test_an_application_that_starts_is_summed_up() -> None:
    state = read_state(details("DEPLOYING"), "jenga")
    assert not state.running
    assert state.failure is None
    assert state.summary() == "Engine:m 1/2 (starting)"
    assert read_state(details("RUNNING"), "jenga").running
    assert read_state({"applications": {}}, "jenga").status == "NOT_STARTED"


def test_the_first_failed_constructor_is_failure_enough() -> None:
    message = "A replica failed to start with exception. Retrying 5 more time(s). Error:\nValueError: too small\n"
    assert read_state(details("DEPLOYING", message), "jenga").failure == "too small"
    assert read_state(details("DEPLOYING", message), "jenga", hosts_may_die=True).failure == "too small"


def test_what_died_with_its_host_is_a_failure_only_where_there_is_one_host() -> None:
    died = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n"
    message = f"A replica failed to start with exception. Retrying 5 more time(s). Error:\n{died}"
    for status, said in (("DEPLOYING", message), ("UNHEALTHY", "A replica's health check failed.")):
        assert read_state(details(status, said), "jenga").failure
        assert read_state(details(status, said), "jenga", hosts_may_die=True).failure is None


def test_a_failed_build_is_explained_by_the_application() -> None:
    message = "Deploying app 'jenga' failed with exception:\nTraceback ...\ndeployments.config.ConfigError: no folder\n"
    assert read_state(details("DEPLOY_FAILED", app_message=message), "jenga").failure == "no folder"
    assert read_state(details("DEPLOY_FAILED", app_message="odd"), "jenga").failure == "odd"
