"""The command line: `python -m panorama -i prompt="sunset over snowy mountains" -o out.png`.

It takes inputs as `cog predict` does and runs the same Predictor as the container, in this
process. Run it from the repository, or through script/predict.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from panorama.picture import write_atomically
from panorama.request import INPUTS, Request
from panorama.weights import WeightsError


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message to stderr and exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes one picture.

    Args:
        arguments: Of the command line; None for those of this process.

    Returns:
        The exit code: 0, or 1 when making the picture failed. Bad arguments exit with 2.
    """
    parser = Parser(prog="panorama", description="Makes a panorama from a prompt.")
    parser.add_argument("-i", metavar="NAME=VALUE", dest="inputs", action="append", default=[])
    parser.add_argument("-o", metavar="FILE", dest="output", default="output.png", type=Path)
    options = parser.parse_args(arguments)
    try:
        request = Request(**parse_inputs(options.inputs))
        check_output(options.output)
        predictor = load_predictor()
        resolved = predictor.resolve(request.inputs())
    except (ValueError, FileNotFoundError, WeightsError) as error:  # the second: no such family
        parser.error(str(error))

    try:
        path = predictor.make(resolved)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    write_atomically(options.output, path.read_bytes())
    print(options.output)
    return 0


def parse_inputs(pairs: Sequence[str]) -> dict[str, Any]:
    """Inputs from `name=value` pairs, each of its input's type where it can be.

    Raises:
        ValueError: A pair without "=", an unknown name, one given twice, or one missing.
    """
    inputs: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-i {pair}: must be NAME=VALUE, such as -i seed=1")
        if name not in INPUTS:
            raise ValueError(f"{name}: no such input; there are {', '.join(INPUTS)}")
        if name in inputs:
            raise ValueError(f"{name}: given twice; give it once")
        inputs[name] = parse_value(INPUTS[name].kind, text)
    for name, rule in INPUTS.items():
        if rule.required and name not in inputs:
            raise ValueError(f"{name}: missing; give it as -i {name}=...")
    return inputs


def parse_value(kind: type, text: str) -> object:
    """The value that `text` stands for; `text` itself, for `Request` to refuse, if none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is Path:
        return Path(text[1:]) if text.startswith("@") else text
    try:
        return kind(text)
    except ValueError:
        return text


def check_output(path: Path) -> None:
    """Checks, before any work, that a picture can be written to `path`.

    Raises:
        ValueError: It cannot.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"-o {path}: must be a file that ends in .png; output.png would do")
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"-o {path}: cannot be written")


def load_predictor() -> Any:
    """Cog's Predictor, set up. Imported only now: loading torch takes seconds."""
    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    return predictor


if __name__ == "__main__":
    sys.exit(main())
