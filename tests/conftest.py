"""Settings that every test needs before anything imports an engine: no network, no telemetry."""

import os

from hypothesis import settings

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    RAY_USAGE_STATS_ENABLED="0",
    # One thread per operator: engines that share a small machine otherwise wait for each other.
    OMP_NUM_THREADS="1",
)

# No test asserts a time: by default Hypothesis fails an example that takes 200 ms, which a busy machine does.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
