"""Jenga: memory for language models whose layers do not all need the same memory."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jenga-serve")
except PackageNotFoundError:  # a source tree on PYTHONPATH, never installed
    __version__ = "0+unknown"
