"""The command line of script/studio."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from panorama.errors import Parser
from panorama.weights import WeightsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted.

    Returns:
        The exit code 0. Bad arguments exit with 2.
    """
    parser = Parser(prog="studio", description="Make panoramas in a browser.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--family", help="model family, in place of PANORAMA_FAMILY")
    source.add_argument("--url", help="Cog server to use in place of the models in this process")
    options = parser.parse_args(arguments)
    from studio.server import listen, serve  # imports Gradio, which takes seconds

    if options.family:
        os.environ["PANORAMA_FAMILY"] = options.family
    try:
        with tempfile.TemporaryDirectory(prefix="panorama-studio-") as folder:
            serve(listen(options.host, options.port), options.url, Path(folder))
    except (ValueError, FileNotFoundError, WeightsError) as error:  # the second: no such family
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
