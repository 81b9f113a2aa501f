"""Ray Serve's log outlives the logging that vLLM sets up."""

import logging
from collections.abc import Iterator
from logging.config import dictConfig
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from deployments import logs


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[MemoryHandler]:
    """What Serve gives its logger in a replica."""
    made = MemoryHandler(1, target=logging.FileHandler(tmp_path / "replica.log"))
    logger = logging.getLogger(logs.SERVE)
    logger.addHandler(made)
    yield made
    logger.removeHandler(made)
    made.close()


def vllm_configures() -> None:
    dictConfig({"version": 1, "disable_existing_loggers": False})


def test_serves_log_goes_on_behind_what_closed_it(buffer: MemoryHandler, tmp_path: Path) -> None:
    logger = logging.getLogger(logs.SERVE)
    with logs.kept_open():
        logger.error("before")
        vllm_configures()
        assert buffer.target is not None, "a controller that comes just now asks for its name"
        logger.error("meanwhile")
    logger.error("after")
    assert (tmp_path / "replica.log").read_text().split() == ["before", "meanwhile", "after"]
    assert buffer.buffer == [], "no record is kept"


def test_without_it_the_log_ends_there(buffer: MemoryHandler, tmp_path: Path) -> None:
    """If this fails, Python no longer closes handlers and `deployments.logs` can go."""
    vllm_configures()
    logging.getLogger(logs.SERVE).error("after")
    assert (tmp_path / "replica.log").read_text() == ""
    assert buffer.target is None


def test_it_goes_on_after_a_start_that_failed(buffer: MemoryHandler) -> None:
    def start() -> None:
        with logs.kept_open():
            vllm_configures()
            raise ValueError("no engine")

    with pytest.raises(ValueError, match="no engine"):
        start()
    assert buffer.target is not None
