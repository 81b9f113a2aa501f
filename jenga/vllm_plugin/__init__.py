"""JENGA's memory manager as a plugin of vLLM.

vLLM loads `register` in every one of its processes through the entry point group ``vllm.general_plugins``.
``JENGA=0`` turns it off; models and configurations it does not manage run on vLLM's own manager, with one
logged line that says why.
"""

import logging
import os

SWITCH = "JENGA"
_registered = False


def register() -> None:
    """Entry point: install the memory manager once per process, unless ``JENGA=0``.

    Raises:
        ValueError: ``JENGA`` is neither 0 nor 1.
        RuntimeError: this vLLM is not one the plugin was built for.
    """
    global _registered
    setting = os.environ.get(SWITCH, "1")
    if setting not in ("0", "1"):
        raise ValueError(f"{SWITCH}={setting!r}: use 1 (Jenga's memory manager, the default) or 0 (vLLM's own)")
    if setting == "0":
        logging.getLogger("vllm.jenga").info("Jenga is off (%s=0): vLLM's own memory manager is in charge", SWITCH)
        return
    if _registered:
        return
    from jenga.vllm_plugin import adapter

    adapter.install()
    _registered = True


def registered() -> bool:
    """Whether the memory manager is installed in this process."""
    return _registered
