"""vLLM plugin: JENGA's memory manager inside the engine."""


def register() -> None:
    """Entry point of ``vllm.general_plugins``."""
