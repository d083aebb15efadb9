"""The web server of the page."""

import os
import socket
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from panorama.environment import load_models
from studio.backends import Backend, CogServer, Library
from studio.page import CSS, RESULTS, Studio


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
