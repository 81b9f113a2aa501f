"""The deployment that the tests of this folder share, and the order in which they use it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.local.ports import free_ports
from deployments.local.record import read
from tests.e2e.test_serve import Running, configuration, jenga

# test_safety has an engine of its own, and goes before there are two more.  Abuse precedes what shows that it left
# nothing behind; test_serve ends the deployment.
_ORDER = ("test_safety.py", "test_hostile.py", "test_serve.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [number for number, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[place] for place in places), key=lambda item: _ORDER.index(item.path.name))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    state = folder / "run"
    ports = tuple(free_ports(3))
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump(configuration(ports[0])))
    options = ["--dashboard-port", str(ports[1]), "--metrics-port", str(ports[2])]
    try:
        result = jenga(state, "serve", str(config), *options)
        assert result.returncode == 0, result.stdout + result.stderr
        record = read(state)
        assert record is not None
        yield Running(state, config, ports, result.stdout, record)
    finally:
        jenga(state, "stop")
