"""The reason of a failed start, out of what processes print."""

import pytest

from deployments.failures import in_our_terms, memory_plan, root_cause

# What vLLM 0.32 printed, shortened.
ENGINE_LOG = """
(EngineCore pid=5975) INFO 11-23 08:59:10 [core.py:120] Initializing a V1 LLM engine
(EngineCore pid=5975) ERROR 11-23 08:59:17 [core.py:1510] EngineCore failed to start.
(EngineCore pid=5975) ERROR 11-23 08:59:17 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=5975) ERROR 11-23 08:59:17 [core.py:1510]   File "core.py", line 1, in run
(EngineCore pid=5975) ERROR 11-23 08:59:17 [core.py:1510]     raise ValueError(
(EngineCore pid=5975) ERROR 11-23 08:59:17 [core.py:1510] ValueError: To serve at least one request with \
the model's max seq len (512), (0.0 GiB KV cache is needed, which is larger than the available KV cache memory \
(0.0 GiB). Based on the available memory, the estimated maximum model length is 32.
(EngineCore pid=5975) Process EngineCore:
(EngineCore pid=5975) Traceback (most recent call last):
(EngineCore pid=5975) ValueError: To serve at least one request again
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
# What Ray Serve put into the deployment's message.
SERVE_MESSAGE = """A replica failed to start with exception. Retrying 5 more time(s). Error:
\x1b[36mray::ServeReplica:jenga:Engine:tiny.initialize_and_get_metadata()\x1b[39m (pid=617, ip=127.0.0.1)
  File "replica.py", line 1, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1867, in initialize
    await self.initialize_callable()
deployments.engine.EngineStartError: the KV memory of a replica is too small
"""


def test_the_engine_cores_own_error_is_found() -> None:
    cause = root_cause(ENGINE_LOG.splitlines())
    assert cause is not None
    assert cause.startswith("To serve at least one request with the model's max seq len (512)")


def test_serves_wrapper_is_seen_through() -> None:
    assert root_cause(SERVE_MESSAGE.splitlines()) == "the KV memory of a replica is too small"


def test_a_log_without_error_has_no_cause() -> None:
    assert root_cause(["INFO 11-23 08:59:10 [core.py:120] ValueErrors: 0", "all is well"]) is None


def test_an_error_without_text_is_named() -> None:
    assert root_cause(["torch.OutOfMemoryError"]) == "OutOfMemoryError"


def test_indented_lines_belong_to_the_message() -> None:
    lines = ["ValidationError: 2 faults", "  one", "  two", "Next line"]
    assert root_cause(lines) == "2 faults\n  one\n  two"


def test_too_little_memory_is_told_in_the_files_terms() -> None:
    cause = root_cause(ENGINE_LOG.splitlines())
    assert cause is not None
    told = in_our_terms(cause, kv_memory=65_536, max_model_len=512)
    assert "engine.kv_memory is 65,536 bytes" in told
    assert "engine.max_model_len is 512 tokens" in told
    assert "about 32 tokens" in told


@pytest.mark.parametrize(
    "ours",
    [
        "65536 bytes of KV memory do not hold one large page: the smallest takes 81920 bytes",
        "KV cache memory of 0.0 MiB (null page deducted) does not hold one request of the model's max seq len",
    ],
)
def test_the_plugins_own_words_for_it_too(ours: str) -> None:
    assert "engine.kv_memory is 65,536 bytes" in in_our_terms(ours, kv_memory=65_536, max_model_len=512)


def test_pydantics_frame_is_taken_off() -> None:
    framed = "1 validation error for ModelConfig\n  Value error, too long. [type=value_error, input_value=x]\n  For"
    assert in_our_terms(framed, kv_memory=None, max_model_len=None) == "too long."


def test_other_reasons_stay_as_they_are() -> None:
    assert in_our_terms("no such tokenizer", kv_memory=1, max_model_len=1) == "no such tokenizer"


def test_the_memory_plan_is_cut_out_of_the_log() -> None:
    at = "(EngineCore pid=8) INFO 11-23 09:43:48 [report.py:20] "
    log = [
        "before",
        at + "Jenga's memory plan",
        at + "| group |",
        at + "2 large pages",
        "(EngineCore pid=8) INFO after",
    ]
    assert memory_plan(log) == "| group |\n2 large pages"
    assert memory_plan(["nothing", "here"]) is None
