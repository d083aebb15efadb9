"""The command line of script/studio."""

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from panorama.environment import load_models
from panorama.errors import Parser
from panorama.weights import WeightsError
from studio.backends import Backend, CogServer, Library
from studio.page import CSS, RESULTS, Studio


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
    if options.family:
        os.environ["PANORAMA_FAMILY"] = options.family
    try:
        with tempfile.TemporaryDirectory(prefix="panorama-studio-") as folder:
            serve(listen(options.host, options.port), options.url, Path(folder))
    except (ValueError, FileNotFoundError, WeightsError) as error:  # the second: no such family
        parser.error(str(error))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ValueError if there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host {host} --port {port}: must be an address of this machine and a free port "
            f"({error}); try --port 0"
        ) from error


def serve(listener: socket.socket, url: str | None, folder: Path) -> None:
    """Serve the page on a backend, the server at a URL or else the library."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    (folder / RESULTS).mkdir()
    host, port = listener.getsockname()[:2]
    here = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    app = FastAPI(openapi_url=None)
    backend: Backend
    if url:
        backend = server = CogServer(url, f"{here}/webhook")
        app.add_api_route("/webhook/{name}", server.report, methods=["POST"])
    else:
        backend = Library(load_models())
    studio = Studio(backend, folder / RESULTS)
    app.mount(f"/{RESULTS}", StaticFiles(directory=folder / RESULTS))
    gr.mount_gradio_app(
        app,
        studio.blocks,
        path="",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    print(f"The studio is at {here}", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        studio.end_all()


if __name__ == "__main__":
    sys.exit(main())
