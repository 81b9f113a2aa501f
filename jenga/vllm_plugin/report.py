"""What the plugin tells an operator at start: the geometry, and what it buys over vLLM's own plan."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils

from jenga.vllm_plugin.config import JengaKVCacheConfig

logger = init_logger("vllm.jenga")


def announce(config: VllmConfig, planned: JengaKVCacheConfig, stock_concurrency: float | str) -> None:
    """Log the table of groups and the capacity beside what vLLM's own plan would have had."""
    logger.info("Jenga's memory plan\n%s", render(config, planned, stock_concurrency))


def render(config: VllmConfig, planned: JengaKVCacheConfig, stock_concurrency: float | str) -> str:
    """The start-up table as text."""
    table = Table("group", "layer type", "layers", "tokens/page", "page bytes", "padding", "pages/large page")
    for column in table.columns[2:]:
        column.justify = "right"
    for place in planned.layout.groups:
        table.add_row(
            place.group.name,
            place.group.policy.kind,
            str(place.group.layers),
            f"{place.group.page_tokens:,}",
            f"{place.group.page_bytes:,}",
            f"{place.padding / place.stride:.2%}",
            str(place.ratio),
        )
    text = StringIO()
    console = Console(file=text, width=110)
    console.print(table)
    large = planned.layout.large_page_bytes
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, planned)
    length = config.model_config.max_model_len
    if isinstance(stock_concurrency, str):
        stock = f"stock vLLM: not computed ({stock_concurrency})"
    else:
        stock = f"stock vLLM: {stock_concurrency:,.2f}"
    print(
        f"{planned.num_blocks:,} large pages of {large:,} bytes ({planned.num_blocks * large / 2**20:,.1f} MiB); "
        f"requests of {length:,} tokens that fit: {concurrency:,.2f} ({stock})",
        file=text,
    )
    return text.getvalue().rstrip()
