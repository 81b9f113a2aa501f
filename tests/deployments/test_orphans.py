"""Processes whose parent is killed."""

import subprocess
import sys
import time
from importlib.metadata import entry_points

import psutil

# The child ignores SIGTERM where asked: then it must go by force.
PARENT = """
import multiprocessing, signal, time

def child(deaf):
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from deployments import orphans
    orphans._LAST_WORDS_S = 1.0
    orphans.register()
    print("ready", multiprocessing.current_process().pid, flush=True)
    time.sleep(120)

if __name__ == "__main__":
    from deployments import orphans
    orphans.register()  # nobody started this by multiprocessing: it watches over nothing
    context = multiprocessing.get_context("spawn")
    for deaf in (False, True):
        context.Process(target=child, args=(deaf,)).start()
    time.sleep(120)
"""


def test_children_of_a_killed_process_end(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    children = []
    try:
        children = [psutil.Process(int(parent.stdout.readline().split()[1])) for _ in range(2)]
        time.sleep(1.5)
        assert all(child.is_running() for child in children), "they end with their parent, not before"
    finally:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        for child in alive:
            child.kill()
    assert len(children) == 2
    assert not alive


def test_vllm_loads_it():
    plugins = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert plugins["jenga-orphans"] == "deployments.orphans:register"
