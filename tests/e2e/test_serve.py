"""`jenga serve` from end to end: two real engines behind the router, on a machine's own terms.

All of it uses one deployment, `served` in conftest.py, which test_hostile.py has abused before.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from deployments.config import engine_deployment, load
from deployments.local.api import ServeApi
from deployments.local.ports import free_ports
from deployments.local.record import Record, read
from jenga.allocator import RESERVED, PageState
from jenga.demo import recall
from jenga.metrics.map import MemoryMap

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gemma3-recall"
MAX_LEN = 512
LONG_PROMPT = "K" * 300

pytestmark = pytest.mark.timeout(600)


def jenga(state: Path, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, not from the repository."""
    script = Path(sys.executable).parent / "jenga"
    # The program must give up before this test does: killed, it could not clean up.
    limit = ["--timeout", str(timeout - 60)] if arguments[0] == "serve" else []
    return subprocess.run(
        [str(script), *arguments, *limit],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"JENGA_STATE_DIR": str(state), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def configuration(port: int, **engine: Any) -> dict[str, Any]:
    """The demo's configuration, smaller."""
    data = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    data["http_options"]["port"] = port
    args = data["applications"][0]["args"]
    args["model"]["path"] = str(ROOT / "var" / "models" / MODEL)
    args["engine"] |= {"max_model_len": MAX_LEN, "max_num_seqs": 16, "kv_memory": "16MiB"} | engine
    return data


@dataclass(frozen=True)
class Running:
    """The deployment under test."""

    state: Path
    config: Path
    ports: tuple[int, int, int]
    output: str
    record: Record

    @property
    def options(self) -> list[str]:
        return ["--dashboard-port", str(self.ports[1]), "--metrics-port", str(self.ports[2])]

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.record.url, timeout=120, trust_env=False)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.record.url}/v1", api_key="none", max_retries=0, timeout=120)

    def scrape(self) -> str:
        return httpx.get(self.record.metrics_url, timeout=30, trust_env=False).text


def answer(running: Running, **fields: Any) -> httpx.Response:
    with running.http as http:
        return http.post("/v1/completions", json={"model": MODEL, "max_tokens": 4, "temperature": 0} | fields)


def events(running: Running, path: str, **fields: Any) -> list[Any]:
    """The server-sent events of a streamed answer, without the closing one."""
    with running.http as http:
        text = http.post(path, json={"model": MODEL, "temperature": 0, "stream": True} | fields).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_start_shows_an_example_and_where_everything_is(served: Running) -> None:
    for shown in (
        "memory plan",
        "sliding_window",
        "pages/large page",
        "curl -s",
        "is right",
        '"object": "chat.completion"',
        served.record.metrics_url,
        served.record.memory_url,
        "jenga stop",
    ):
        assert shown in served.output
    assert "Traceback" not in served.output


def test_nothing_listens_beyond_the_loopback(served: Running) -> None:
    family = [psutil.Process(served.record.supervisor.pid)]
    family += family[0].children(recursive=True)
    pids = {process.pid for process in family}
    # Seen from outside: sockets of other network namespaces do not show.
    here = [c for c in psutil.net_connections("tcp") if c.pid in pids and c.status == psutil.CONN_LISTEN]
    assert {c.laddr.port for c in here} == set(served.ports)
    assert {c.laddr.ip for c in here} == {"127.0.0.1"}


def test_models(served: Running) -> None:
    listed = served.client.models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert listed[0].created > 0
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("nope")


def test_completion_with_the_openai_client(served: Running) -> None:
    got = served.client.completions.create(
        model=MODEL, prompt="A B C", max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert got.usage is not None
    assert got.usage.completion_tokens == 5
    assert got.choices[0].finish_reason == "length"


def test_chat_with_the_openai_client(served: Running) -> None:
    messages: list[Any] = [{"role": "user", "content": "A B C"}]
    got = served.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, temperature=0)
    assert got.choices[0].message.role == "assistant"
    streamed = served.client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=5, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == (got.choices[0].message.content or "")


def test_a_stream_says_the_same_and_ends_with_usage(served: Running) -> None:
    whole = answer(served, prompt=LONG_PROMPT + "stream", max_tokens=6).json()
    parts = events(
        served,
        "/v1/completions",
        prompt=LONG_PROMPT + "stream",
        max_tokens=6,
        stream_options={"include_usage": True},
    )
    assert "".join(p["choices"][0]["text"] for p in parts if p["choices"]) == whole["choices"][0]["text"]
    usage = parts[-1]["usage"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_repeated_prompt_is_cached_on_the_replica_it_went_to(served: Running) -> None:
    for turn in range(4):
        prompt = f"{turn}" * 200
        first, second, third = (answer(served, prompt=prompt).json()["usage"] for _ in range(3))
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        for again in (second, third):
            assert again["prompt_tokens_details"]["cached_tokens"] >= 32
            assert again["prompt_tokens"] == first["prompt_tokens"]


BAD = {
    "malformed JSON": ("completions", b'{"model": ', 400, "not valid JSON", "invalid_json"),
    "no object": ("completions", b"[1]", 400, "must be a JSON object", "invalid_json"),
    "empty body": ("completions", b"", 400, "must be a JSON object", "invalid_json"),
    "unknown model": (
        "completions",
        {"model": "gpt-9", "prompt": "x"},
        404,
        "'gpt-9' does not exist",
        "model_not_found",
    ),
    "unknown model, chat": (
        "chat/completions",
        {"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]},
        404,
        f"served here: {MODEL}",
        "model_not_found",
    ),
    "no prompt": ("completions", {"model": MODEL}, 400, "prompt", None),
    "no messages": ("chat/completions", {"model": MODEL}, 400, "messages: This field is required", "invalid_value"),
    "messages of a wrong type": (
        "chat/completions",
        {"model": MODEL, "messages": 3},
        400,
        "not the form",
        "invalid_value",
    ),
    "no messages in the list": ("chat/completions", {"model": MODEL, "messages": []}, 400, "at least one", None),
    "max_tokens of a wrong type": (
        "completions",
        {"model": MODEL, "prompt": "x", "max_tokens": "many"},
        400,
        "max_tokens: ",
        "invalid_value",
    ),
    "prompt of a wrong type": (
        "completions",
        {"model": MODEL, "prompt": {"a": 1}},
        400,
        "prompt: ",
        "invalid_value",
    ),
    "negative temperature": (
        "completions",
        {"model": MODEL, "prompt": "x", "temperature": -1},
        400,
        "temperature must be non-negative, got -1",
        None,
    ),
    "token outside the vocabulary": ("completions", {"model": MODEL, "prompt": [10**6]}, 400, "vocabulary", None),
    "lone surrogate": (
        "completions",
        b'{"model": "' + MODEL.encode() + b'", "prompt": "\\ud800", "max_tokens": 1}',
        400,
        "Unicode",
        "invalid_value",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_openais_form(served: Running, case: str) -> None:
    path, body, status, said, code = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with served.http as http:
        got = http.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == (status, code), got.text
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in got.text
    assert "parameter=" not in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [MAX_LEN, 20 * MAX_LEN])
def test_a_prompt_beyond_the_models_length_is_refused_with_both_numbers(
    served: Running, tokens: int, stream: bool
) -> None:
    got = answer(served, prompt=[7] * tokens, max_tokens=1, stream=stream)
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == (400, "context_length_exceeded"), got.text
    assert re.search(rf"\b{MAX_LEN}\b", error["message"])
    assert re.search(rf"\b{tokens}\b|\b{tokens + 1}\b", error["message"])


def test_paths_that_are_not_served(served: Running) -> None:
    with served.http as http:
        for method, path, status in (("GET", "/v1/nope", 404), ("GET", "/v1/completions", 405)):
            got = http.request(method, path)
            assert got.status_code == status
            assert path in got.json()["error"]["message"]


def replicas_used(running: Running) -> dict[str, float]:
    """Finished requests by replica, from vLLM's own counter in Ray's metrics."""
    pattern = r"^ray_vllm_request_success_total\{(.*)\} ([\d.e+]+)$"
    used: dict[str, float] = {}
    for labels, value in re.findall(pattern, running.scrape(), re.MULTILINE):
        replica = re.search(r'ReplicaId="([^"]+)"', labels)
        if replica:
            used[replica[1]] = used.get(replica[1], 0) + float(value)
    return used


def test_both_replicas_answer_and_are_counted(served: Running) -> None:
    for i in range(24):
        assert answer(served, prompt=f"{i:03d} " * 40, max_tokens=1).status_code == 200
    end = time.monotonic() + 40
    while sum(count > 0 for count in replicas_used(served).values()) < 2:
        assert time.monotonic() < end, replicas_used(served)
        time.sleep(2)


def predictions(running: Running) -> dict[str, float]:
    """Requests by what became of the router's prediction, from the living replicas (Ray drops others' some time)."""
    found: dict[str, float] = {}
    living = reports(running).keys()
    pattern = r"^ray_jenga_router_predictions_total\{(.*)\} ([\d.e+]+)$"
    for text, value in re.findall(pattern, running.scrape(), re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', text))
        if labels["replica"] in living:
            found[labels["outcome"]] = found.get(labels["outcome"], 0) + float(value)
    return found


def ask_about_tables(running: Running, requests: int, seed: int) -> tuple[int, int]:
    """Questions about a few tables, one after the other: right answers, and cached tokens."""
    right = cached = 0
    for i in range(requests):
        question = recall.table(seed + i * 7 % 8, 100).ask(i % 90, "?")
        with running.http as http:
            got = http.post(
                "/v1/chat/completions",
                json={"model": MODEL, "messages": question.messages, "max_tokens": 4, "temperature": 0},
            )
        assert got.status_code == 200, got.text
        right += got.json()["choices"][0]["message"]["content"] == question.answer
        cached += got.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return right, cached


def counted(running: Running, requests: float) -> dict[str, float]:
    """Predictions, once that many are counted."""
    end = time.monotonic() + 60
    while sum((found := predictions(running)).values()) < requests:
        assert time.monotonic() < end, found
        time.sleep(2)
    return found


def settled(running: Running) -> dict[str, float]:
    """Predictions, once those of earlier tests are counted: on a busy machine that takes a while."""
    found, since, end = predictions(running), time.monotonic(), time.monotonic() + 90
    while time.monotonic() - since < 10:
        assert time.monotonic() < end, found
        time.sleep(2)
        now = predictions(running)
        if now != found:
            found, since = now, time.monotonic()
    return found


def test_the_router_knows_what_is_cached(served: Running) -> None:
    before = settled(served)
    right, cached = ask_about_tables(served, 60, seed=100)
    assert right >= 57
    assert cached > 10_000
    after = counted(served, sum(before.values()) + 60)
    assert after["exact"] - before.get("exact", 0) == 60, (before, after)


def reports(running: Running) -> dict[str, Any]:
    """Each replica's last report, as the memory map has it."""
    with running.http as http:
        return {each["replica"]: each["report"] for each in http.get("/memory/data").json()["replicas"]}


def pages(running: Running, replica: str) -> MemoryMap:
    with running.http as http:
        got = http.get("/memory/pages", params={"replica": replica})
    assert got.status_code == 200, got.text
    named, taken = MemoryMap.decode(got.content)
    assert named == replica
    return taken


def large_page(running: Running, replica: str, large: int) -> dict[str, Any]:
    with running.http as http:
        found: dict[str, Any] = http.get("/memory/page", params={"replica": replica, "large": large}).json()
    return found


def test_the_memory_map_shows_the_pages_that_the_reports_count(served: Running) -> None:
    with served.http as http:
        assert "<canvas" in http.get("/memory").text
    answer(served, prompt="cached from now on " * 12)
    end = time.monotonic() + 30
    while True:  # a report is older than a map
        told = reports(served)
        maps = {replica: pages(served, replica) for replica in told}
        seen = {
            replica: [(c[PageState.LIVE], c[PageState.CACHED], c[PageState.FREE]) for c in taken.count()]
            for replica, taken in maps.items()
        }
        reported = {
            replica: [(g["live_pages"], g["cached_pages"], g["stranded_pages"]) for g in report["memory"]["groups"]]
            for replica, report in told.items()
        }
        if seen == reported:
            break
        assert time.monotonic() < end, (seen, reported)
        time.sleep(1)
    assert len(told) == 2
    found = 0
    for replica, taken in maps.items():
        owners = memoryview(taken.owners).cast("b")
        assert owners[0] == RESERVED
        owned = [large for large, owner in enumerate(owners) if owner >= 0]
        for large in owned[:3]:
            shown = large_page(served, replica, large)
            group = taken.groups[owners[large]]
            assert (shown["group"], len(shown["pages"])) == (group.name, group.ratio)
            for page in shown["pages"]:
                assert page["state"] in ("cached", "free"), "nothing runs"
                assert page["owners"] == []
                if page["state"] == "cached":
                    found += 1
                    assert page["end"] - page["begin"] == group.page_tokens
                    assert 0 <= page["unused_s"] < 600
    assert found


def test_the_memory_map_names_the_requests_that_hold_pages(served: Running) -> None:
    def generate(number: int) -> set[str]:
        """Ask until somebody was seen; the ids of the answers."""
        names = set()
        while not holders:
            got = answer(served, prompt=f"{number} who " * 20, max_tokens=300, ignore_eos=True)
            names.add(got.json()["id"])
        return names

    holders: set[str] = set()
    end = time.monotonic() + 60
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(generate, number) for number in range(4)]
        while not holders:
            for replica in reports(served):
                taken = pages(served, replica)
                for group, states in zip(taken.groups, taken.states, strict=True):
                    number = states.find(PageState.LIVE)
                    shown = large_page(served, replica, number // group.ratio) if number >= 0 else {"pages": []}
                    holders |= {owner for page in shown["pages"] for owner in page["owners"] if page["end"] > 0}
            if time.monotonic() > end:
                holders.add("nobody")
    names = {name for future in asked for name in future.result()}
    assert all(any(owner.startswith(name) for name in names) for owner in holders), (holders, names)


def test_top_finds_the_deployment(served: Running) -> None:
    shown = jenga(served.state, "top", "--once")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(jenga(served.state, "top", "--json").stdout)
    for replica in told["replicas"]:
        assert f"replica {replica['replica']}" in shown.stdout
    assert shown.stdout.count("sliding_window_64") == len(told["replicas"]) == 2


def followed(running: Running) -> float:
    """Replicas whose stream of events a router follows without a gap."""
    pattern = r'^ray_jenga_router_replicas\{.*stream="in_order".*\} ([\d.e+]+)$'
    found = re.findall(pattern, running.scrape(), re.MULTILINE)
    return max(map(float, found), default=0.0)


def engine_cores(above: psutil.Process) -> list[psutil.Process]:
    """vLLM's engine cores among a process's descendants, of which some may end meanwhile."""
    found = []
    for process in above.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
            if "EngineCore" in process.name() + " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Stream:
    """What a client has of a streamed answer."""

    number: int
    events: list[str] = field(default_factory=list)

    def read(self, running: Running) -> "Stream":
        """Ask, and take event by event."""
        body = {"model": MODEL, "prompt": f"{self.number} " * 40, "max_tokens": 400, "temperature": 0}
        with (
            running.http as http,
            http.stream("POST", "/v1/completions", json=body | {"stream": True, "ignore_eos": True}) as got,
        ):
            assert got.status_code == 200, got.read()
            self.events.extend(line.removeprefix("data: ") for line in got.iter_lines() if line)
        return self

    @property
    def whole(self) -> bool:
        return self.events[-1] == "[DONE]" and not any("error" in json.loads(event) for event in self.events[:-1])


def test_streams_of_a_killed_engine_are_cut_with_an_error_or_begin_elsewhere(served: Running) -> None:
    supervisor = psutil.Process(served.record.supervisor.pid)
    running = len(engine_cores(supervisor))
    victim = engine_cores(supervisor)[0]
    with ThreadPoolExecutor(16) as pool:
        begun = [Stream(number) for number in range(8)]
        asked = [pool.submit(stream.read, served) for stream in begun]
        while not all(stream.events for stream in begun):
            assert not any(future.done() and future.exception() for future in asked)
            time.sleep(0.01)
        # Stopped, it takes requests and answers none.
        victim.suspend()
        late = [Stream(number) for number in range(8, 16)]
        asked += [pool.submit(stream.read, served) for stream in late]
        time.sleep(2)
        waiting = [stream for stream in late if not stream.events]
        victim.kill()
        for future in asked:
            future.result()
    assert waiting, "some were sent to the engine that was stopped"
    assert all(stream.whole for stream in late), "nothing of them was sent yet, so they went to the other one"
    cut = [stream for stream in begun if not stream.whole]
    assert cut, "some were under way there"
    for stream in cut:
        *before, last = stream.events
        assert not any("error" in json.loads(event) for event in before)
        error = json.loads(last)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
    wait_for_engines(served, running)


def wait_for_engines(running: Running, number: int) -> None:
    """Until that many replicas run and a router follows them."""
    end = time.monotonic() + 120
    while len(engine_cores(psutil.Process(running.record.supervisor.pid))) < number or not (
        jenga(running.state, "status").stdout.count("RUNNING") > number + 1
    ):
        assert time.monotonic() < end, "the replica comes back"
        time.sleep(2)
    # What is sent to a replica whose stream no router follows yet is promised nothing, and not counted.
    end = time.monotonic() + 30
    while followed(running) < number and time.monotonic() < end:
        time.sleep(1)


def test_a_killed_engine_costs_no_request_and_is_promised_nothing(served: Running) -> None:
    shown = reports(served)
    supervisor = psutil.Process(served.record.supervisor.pid)
    engines = engine_cores(supervisor)
    assert len(engines) == 2
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask_about_tables, served, 12, 200 + 10 * i) for i in range(4)]
        time.sleep(0.5)
        engines[0].kill()
        assert all(future.result()[0] >= 10 for future in asked), "every request is answered, by the other replica"
    wait_for_engines(served, 2)
    time.sleep(8)
    before = predictions(served)
    ask_about_tables(served, 40, seed=300)
    after = counted(served, sum(before.values()) + 40)
    assert after["exact"] - before.get("exact", 0) == 40, (before, after)
    (gone,) = shown.keys() - reports(served).keys()
    with served.http as http:
        got = http.get("/memory/pages", params={"replica": gone})
    assert (got.status_code, got.json()["error"]["code"]) == (404, "replica_gone")


def test_memory_by_group_and_state_reaches_the_scrape_with_a_replica_label(served: Running) -> None:
    end = time.monotonic() + 40
    while True:
        lines = re.findall(r"^ray_jenga_memory_bytes\{(.*)\} ([\d.e+]+)$", served.scrape(), re.MULTILINE)
        series = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in lines]
        replicas = {labels.get("replica") for labels, _ in series}
        if len(replicas) == 2:
            break
        assert time.monotonic() < end, lines
        time.sleep(2)
    for replica in replicas:
        mine = [(labels, value) for labels, value in series if labels["replica"] == replica]
        assert len({labels["group"] for labels, _ in mine}) >= 3
        assert {"needed", "cached", "stranded", "free"} <= {labels["state"] for labels, _ in mine}
        whole = re.search(
            rf'^ray_jenga_buffer_bytes\{{.*replica="{replica}".*\}} ([\d.e+]+)$', served.scrape(), re.MULTILINE
        )
        assert whole is not None
        assert sum(value for _, value in mine) == float(whole[1])
        # Whole large pages of what the configuration grants.
        assert 0.98 * 16 * 2**20 < float(whole[1]) <= 16 * 2**20


def test_vllms_own_load_generator_works_against_it(served: Running, tmp_path: Path) -> None:
    options = {
        "base-url": served.record.url,
        "model": MODEL,
        "tokenizer": str(ROOT / "var" / "models" / MODEL),
        "dataset-name": "random",
        "random-input-len": "60",
        "random-output-len": "8",
        "num-prompts": "16",
        "max-concurrency": "4",
        "result-dir": str(tmp_path),
        "result-filename": "result.json",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "vllm_bench_serve.py"), *flags, "--save-result", "--disable-tqdm"],
        check=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (16, 0)
    assert result["total_output_tokens"] == 16 * 8


def test_status_shows_replicas_and_addresses(served: Running) -> None:
    shown = jenga(served.state, "status")
    assert shown.returncode == 0
    assert "RUNNING" in shown.stdout
    assert served.record.url in shown.stdout
    data = json.loads(jenga(served.state, "status", "--json").stdout)
    assert data["running"] is True
    assert data["url"] == served.record.url
    assert [r["state"] for r in data["replicas"]].count("RUNNING") == 3


def test_from_another_folder_one_is_told_where_to_look(served: Running, tmp_path: Path) -> None:
    for command, code in (("status", 3), ("stop", 0)):
        told = jenga(tmp_path, command)
        assert told.returncode == code
        assert f"nothing is being served from here (no record in {tmp_path})" in told.stdout
        assert f"{served.record.url}: `jenga {command} --state-dir {served.state}`" in told.stdout
    found = json.loads(jenga(tmp_path, "status", "--json").stdout)
    assert (found["running"], found["elsewhere"][str(served.state)]) == (False, served.record.url)
    assert jenga(tmp_path, "status", "--state-dir", str(served.state)).returncode == 0


def test_a_second_serve_is_refused_and_hurts_nobody(served: Running) -> None:
    second = jenga(served.state, "serve", str(served.config), *served.options)
    assert second.returncode == 1
    assert "already served" in second.stderr
    assert "jenga stop" in second.stderr
    assert answer(served, prompt="still there").status_code == 200


def test_a_port_in_use_is_refused_before_anything_starts(served: Running, tmp_path: Path) -> None:
    other = jenga(tmp_path / "run", "serve", str(served.config))
    assert other.returncode == 1
    assert f"port {served.ports[0]} (REST) is in use" in other.stderr
    assert "--port" in other.stderr
    assert read(tmp_path / "run") is None


def test_fewer_replicas_are_the_ones_there_were(served: Running) -> None:
    """A file with another number of replicas, handed to Serve as `jenga up --no-restart` does, starts nothing anew."""

    def replicas() -> dict[str, str]:
        shown = json.loads(jenga(served.state, "status", "--json").stdout)
        return {each["id"]: each["deployment"] for each in shown["replicas"] if each["state"] == "RUNNING"}

    before = replicas()
    config = load(served.config)
    args = config.application.args.model_copy(update={"replicas": 1})
    fewer = config.model_copy(update={"applications": [config.application.model_copy(update={"args": args})]})
    ServeApi(served.record.dashboard_url).deploy(fewer.to_ray())
    end = time.monotonic() + 120
    while list(replicas().values()).count(engine_deployment(MODEL)) > 1:
        assert time.monotonic() < end, replicas()
        time.sleep(1)
    assert replicas().items() <= before.items()
    assert "Ingress" in replicas().values()
    assert answer(served, prompt="still there").status_code == 200


def test_stop_leaves_no_process_no_port_and_no_file(served: Running) -> None:
    """Last of those that use the deployment."""
    family = psutil.Process(served.record.supervisor.pid).children(recursive=True)
    assert len(family) > 5
    stopped = jenga(served.state, "stop")
    assert stopped.returncode == 0
    assert not served.record.supervisor.alive()
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for port in served.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert not Path(served.record.ray_dir).exists()
    assert read(served.state) is None
    again = jenga(served.state, "stop")
    assert again.returncode == 0
    assert "nothing is being served" in again.stdout


def failed_start(tmp_path: Path, data: dict[str, Any]) -> str:
    """Serve what cannot be served; returns what is said, after checking that nothing is left."""
    state = tmp_path / "run"
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(data))
    ports = free_ports(2)
    result = jenga(state, "serve", str(config), "--dashboard-port", str(ports[0]), "--metrics-port", str(ports[1]))
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    assert read(state) is None
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(ports[0]) in " ".join(p.info["cmdline"] or [])]
    assert mine == []
    return result.stderr


def test_a_missing_model_folder_is_named_before_anything_starts(tmp_path: Path) -> None:
    data = configuration(free_ports(1)[0])
    data["applications"][0]["args"]["model"] = {"id": "m", "path": str(tmp_path / "absent")}
    assert f"the model folder {tmp_path / 'absent'} does not exist" in failed_start(tmp_path, data)


def test_kv_memory_too_small_for_one_request_is_told_in_the_files_terms(tmp_path: Path) -> None:
    data = configuration(free_ports(1)[0], kv_memory="64KiB")
    data["applications"][0]["args"]["replicas"] = 1
    said = failed_start(tmp_path, data)
    assert "engine.kv_memory" in said
    assert "engine.max_model_len" in said


def test_ctrl_c_while_starting_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / "run"
    port, dashboard, metrics = free_ports(3)
    config = tmp_path / "serving.yaml"
    config.write_text(yaml.safe_dump(configuration(port)))
    script = Path(sys.executable).parent / "jenga"
    line = [str(script), "serve", str(config), "--dashboard-port", str(dashboard), "--metrics-port", str(metrics)]
    start = subprocess.Popen(
        line,
        env=os.environ | {"JENGA_STATE_DIR": str(state)},
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job starts with SIGINT ignored, and the tests may be run by one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while (record := read(state)) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(2)
    start.send_signal(signal.SIGINT)
    output, _ = start.communicate(timeout=60)
    assert start.returncode == 130
    assert "interrupted" in output
    assert not record.supervisor.alive()
    assert read(state) is None
