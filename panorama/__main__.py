"""The command line: `panorama "sunset over snowy mountains" -i loop_closure=true -o out.png`.

It takes inputs as `cog predict` does, and the prompt without `-i prompt=` too. `python -m panorama`
and script/predict run it as well.
"""

import argparse
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panorama.environment import load_models
from panorama.errors import Parser, shorten
from panorama.images.files import SUFFIXES, Panorama, check_place, write_atomically
from panorama.images.viewer import PAGE, page
from panorama.request import EVERY_MODE, INPUTS, Input, Request
from panorama.weights import WeightsError

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_EVERY = 5  # steps
INDENT = 4  # columns, of the text on an input
WIDEST = 100  # columns of the help
VALUES = {str: "TEXT", bool: "true", int: "INTEGER", float: "NUMBER", Path: "@FILE"}
"""The placeholder in the help for a value of each type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one panorama.

    Returns:
        The exit code: 0, 1 if making the panorama failed, 130 if it was interrupted. Bad
        arguments exit with 2.
    """
    parser = Parser(
        prog="panorama",
        description="Make a panorama from a prompt.",
        epilog="\n".join(describe_inputs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt", nargs="*", help="the prompt, in quotes; short for -i prompt=PROMPT"
    )
    parser.add_argument(
        "-i",
        metavar="NAME=VALUE",
        dest="inputs",
        action="append",
        default=[],
        help="one of the inputs listed below; a file's name follows @, as in image=@a.png",
    )
    parser.add_argument(
        "-o",
        metavar="FILE",
        dest="output",
        type=Path,
        help=f"its ending sets output_format, or is {PAGE} for a viewer; default: output.FORMAT",
    )
    parser.add_argument(
        "--previews",
        metavar="FOLDER",
        type=Path,
        help=f"write a preview there after the first step and every {PREVIEW_EVERY} steps later",
    )
    options = parser.parse_args(arguments)
    try:
        inputs = parse_inputs(options.inputs, options.prompt)
        request = Request(**imply_format(options.output) | inputs)
        output = options.output or Path(f"output.{request.output_format}")
        check_output(output, request.output_format)
        if options.previews:
            make_folder(options.previews)
        models = load_models()
        job = models.prepare(request)
    except (ValueError, FileNotFoundError, WeightsError) as error:  # the second: no such family
        parser.error(str(error))

    print(f"seed: {job.request.seed}\ncost: {job.cost:.0f}", flush=True)
    try:
        panorama = models.run(job, partial(report, options.previews))
        save(panorama, output, request)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    print(output)
    return 0


def describe_inputs() -> Iterator[str]:
    """Yield the lines of the help on inputs, grouped by the modes that take them."""
    wrap = partial(
        textwrap.wrap,
        width=min(shutil.get_terminal_size().columns, WIDEST),
        initial_indent=" " * INDENT,
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
    )
    for modes in dict.fromkeys(rule.modes for rule in INPUTS.values()):
        yield f"inputs of {'every mode' if modes == EVERY_MODE else ' and '.join(modes)}:"
        for rule in INPUTS.values():
            if rule.modes == modes:
                yield f"  {rule.name}={'|'.join(map(str, rule.choices)) or VALUES[rule.kind]}"
                yield from wrap(f"{rule.description} {notes(rule)}")
        yield ""


def notes(rule: Input) -> str:
    """Return the range and the default of an input in brackets, "" if it has neither."""
    found = [] if rule.choices or not rule.legal else [rule.legal]
    if rule.required:
        found.append("required")
    elif rule.default not in (None, ""):
        found.append(f"default: {str(rule.default).lower()}")
    return f"[{'; '.join(found)}]" if found else ""


def parse_inputs(pairs: Sequence[str], words: Sequence[str] = ()) -> dict[str, Any]:
    """Parse `name=value` pairs, each into its input's type where possible; refuse bad pairs.

    Args:
        pairs: as they follow `-i`.
        words: arguments that follow no option: the prompt, if it is given there.
    """
    text = " ".join(words)
    if text.partition("=")[0] in INPUTS:
        raise ValueError(f"{shorten(text)}: must follow -i; try -i {shorten(words[0])}")
    if len(words) > 1:
        raise ValueError(f"prompt: must be one argument, in quotes; try {shorten(text)}")
    inputs: dict[str, Any] = {"prompt": text} if words else {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-i {shorten(pair)}: must be NAME=VALUE; try seed=1")
        if name not in INPUTS:
            raise ValueError(f"-i {shorten(name)}: must be one of {', '.join(INPUTS)}")
        if name in inputs:
            raise ValueError(f"{name}: must be given once")
        inputs[name] = parse_value(INPUTS[name], text)
    for name, rule in INPUTS.items():
        if rule.required and name not in inputs:
            raise ValueError(f"{name}: must be given; try -i {name}={rule.example!r}")
    return inputs


def parse_value(rule: Input, text: str) -> object:
    """Return the value that a text stands for, or else the text, for `Request` to refuse."""
    if rule.takes_file and text.startswith("@"):
        return Path(text[1:])
    if rule.kind in (str, Path):
        return text
    if rule.kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    for parse in (int, float):
        with suppress(ValueError):
            return parse(text)
    return text


def imply_format(path: Path | None) -> dict[str, str]:
    """Return the input that the ending of a path implies, if it implies one."""
    implied = SUFFIXES.get(path.suffix.lower()) if path else None
    return {"output_format": implied} if implied else {}


def check_output(path: Path, output_format: str) -> None:
    """Raise ValueError, before any work, if no image of a format can be written to a path."""
    suffix = path.suffix.lower()
    if suffix != PAGE and SUFFIXES.get(suffix) != output_format:
        raise ValueError(
            f"-o {path}: must be a file that ends in {', '.join(SUFFIXES)} or {PAGE}, and as "
            f"output_format says if that is given; try output.{output_format}"
        )
    check_place(path, f"output.{output_format}")


def save(panorama: Panorama, path: Path, request: Request) -> None:
    """Write a panorama as an image, or as a page that shows it."""
    if path.suffix.lower() == PAGE:
        data = panorama.encode(request.output_format, request.output_quality)
        write_atomically(path, page(data))
    else:
        panorama.save(path, request.output_quality)


def make_folder(path: Path) -> None:
    """Make a folder for previews, if it is not there; ValueError if none can be written there."""
    with suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"--previews {path}: must be a folder that is writable; try previews")


def report(folder: Path | None, step: int, steps: int, preview: Callable[[], "Image"]) -> None:
    """Print a step, and write a preview of every few steps into a folder, if there is one."""
    print(f"step {step}/{steps}", flush=True)
    if folder and step % PREVIEW_EVERY == 1:
        preview().save(folder / f"step-{step:03}.png")


if __name__ == "__main__":
    sys.exit(main())
