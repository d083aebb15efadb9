"""What makes the panoramas of the page: the library in this process, or a Cog server."""

import base64
import mimetypes
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2

from panorama.errors import shorten
from panorama.request import EVERY_MODE, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from panorama.modes import Models

OnStep = Callable[[int, int, "Callable[[], Image] | None"], None]
"""Called with the number of a step, the number of steps, and a function for a preview, or None."""
FAILED = re.compile(r"^(Prediction failed: )*(ValueError: )?")  # what Cog puts before an error
STEP = re.compile(r"^step (\d+)/(\d+)$", re.MULTILINE)  # in a prediction's log
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Backend(Protocol):
    """Makes panoramas, one at a time."""

    @property
    def modes(self) -> Sequence[str]:
        """The modes that it offers."""

    def make(self, request: Request, on_step: OnStep, poll: Callable[[], None]) -> bytes:
        """Make a panorama and return the bytes of its file.

        Args:
            request: with paths of files on this machine.
            on_step: called after every step, if the backend learns of it.
            poll: called often; an exception that it raises ends the run.

        Raises:
            ValueError: an input is not legal. The message names it.
        """


class Library:
    """The models in this process."""

    def __init__(self, models: "Models") -> None:
        self.models = models
        self.modes = tuple(models.bases)

    def make(self, request: Request, on_step: OnStep, poll: Callable[[], None]) -> bytes:
        """Make a panorama; see `Backend`."""
        panorama = self.models.run(self.models.prepare(request), on_step, poll)
        return panorama.encode(request.output_format, request.output_quality)


class CogServer:
    """A running Cog server of panorama.

    It reports its steps to a webhook, which it can reach only if both run on one machine.

    Args:
        url: of the server.
        webhook: the URL that its events reach, without the ID of the prediction.

    Raises:
        ValueError: the URL is not legal, or no server answers there.
    """

    modes = EVERY_MODE  # Cog does not say which are loaded; the server refuses the others

    def __init__(self, url: str, webhook: str) -> None:
        self.url, self.webhook = url.rstrip("/"), webhook
        self.running: dict[str, OnStep] = {}
        advice = "try http://127.0.0.1:5000, where script/serve listens"
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"--url {shorten(url)}: must be an http or https URL; {advice}")
        try:
            httpx2.get(f"{self.url}/health-check").raise_for_status().json()["status"]
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--url {shorten(url)}: must be of a Cog server that runs ({error}); {advice}"
            ) from error

    def make(self, request: Request, on_step: OnStep, poll: Callable[[], None]) -> bytes:
        """Make a panorama; see `Backend`."""
        name = uuid4().hex
        body: dict[str, Any] = {"id": name, "input": to_json(request)}
        events = {"webhook": f"{self.webhook}/{name}", "webhook_events_filter": ["logs"]}
        self.running[name] = on_step
        try:
            local = urlsplit(self.url).hostname in LOOPBACK
            answer = self.post(body | events if local else body, poll)
            if local and answer.status_code == 422 and "webhook" in answer.text:  # by a proxy
                answer = self.post(body, poll)
        finally:
            del self.running[name]
        return read_output(answer)

    def post(self, body: Mapping[str, Any], poll: Callable[[], None]) -> httpx2.Response:
        """Post a prediction and wait for its answer; cancel it if `poll` raises."""
        url = f"{self.url}/predictions"
        with ThreadPoolExecutor(1) as thread:
            post = thread.submit(httpx2.post, url, json=body, timeout=None)
            try:
                while not wait([post], timeout=0.1).done:
                    poll()
            except BaseException:
                while not post.done():  # the server may not have read the prediction yet
                    with suppress(httpx2.HTTPError):
                        httpx2.post(f"{url}/{body['id']}/cancel")
                    wait([post], timeout=0.5)
                raise
        return post.result()

    async def report(self, name: str, event: dict[str, Any]) -> None:
        """Pass the last step in the log of a prediction on to the page."""
        steps = STEP.findall(event.get("logs", ""))
        if steps and name in self.running:
            step, total = steps[-1]
            self.running[name](int(step), int(total), None)


def to_json(request: Request) -> Mapping[str, Any]:
    """Return the inputs of a request that are set, with files as data: URLs."""
    inputs = request.inputs()
    return {name: to_url(inputs[name]) for name in inputs if request.sets(name)}


def to_url(value: Any) -> Any:
    """Return a data: URL of a file, or any other value as it is."""
    if not isinstance(value, Path):
        return value
    media_type = mimetypes.guess_type(value.name)[0] or "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(value.read_bytes()).decode()}"


def read_output(answer: httpx2.Response) -> bytes:
    """Return the file in a server's answer; ValueError with its error if there is none."""
    try:
        body = answer.json()
    except ValueError as error:
        reason = f"{answer.status_code} {answer.reason_phrase}"
        raise ValueError(f"the server answers with {reason}, not with a prediction") from error
    if body.get("status") != "succeeded":
        message = str(body.get("error") or body.get("detail") or body)
        raise ValueError(FAILED.sub("", message))
    return base64.b64decode(body["output"].partition(",")[2])
