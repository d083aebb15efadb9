"""The command lines of script/view and script/export."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from panorama.errors import Parser
from panorama.images.files import check_place
from panorama.images.viewer import PAGE, view


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the viewer or the faces of an image, and print the files.

    Returns:
        The exit code 0. Bad arguments exit with 2.
    """
    parser = Parser(prog="panorama.images", description=__doc__)
    commands = parser.add_subparsers(metavar="view, export", required=True)
    viewing = commands.add_parser("view", prog="view", help="write a page that shows an image")
    viewing.add_argument("image", type=Path, help="a PNG, JPEG or WebP")
    viewing.add_argument(
        "-o", metavar="FILE", dest="output", type=Path, help="defaults to the image's name in .html"
    )
    viewing.set_defaults(write=write_page, refuse=viewing.error)
    exporting = commands.add_parser("export", prog="export", help="write faces and views")
    exporting.add_argument("image", type=Path, help="a PNG, JPEG or WebP that is a 360")
    exporting.add_argument(
        "-o", metavar="FOLDER", dest="output", type=Path, help="defaults to the image's name"
    )
    exporting.add_argument(
        "--size", type=int, help="width of the files, pixels; defaults to a quarter of the image's"
    )
    exporting.set_defaults(write=write_faces, refuse=exporting.error)
    options = parser.parse_args(arguments)
    try:
        if not options.image.is_file():
            raise ValueError(f"{options.image}: must be a file that exists; try output.png")
        print(*options.write(options), sep="\n")
    except (ValueError, OSError) as error:
        options.refuse(str(error))
    return 0


def write_page(options: Namespace) -> list[Path]:
    """Write the page of an image, and return its path."""
    output = options.output or options.image.with_suffix(PAGE)
    if output.suffix.lower() != PAGE:
        raise ValueError(f"-o {output}: must be a file that ends in {PAGE}; try output{PAGE}")
    check_place(output, f"output{PAGE}")
    view(options.image, output)
    return [output]


def write_faces(options: Namespace) -> list[Path]:
    """Write the faces and views of an image, and return their paths."""
    from panorama.images.cubemap import export  # imports torch, which takes seconds

    return export(options.image, options.output or options.image.with_suffix(""), options.size)


if __name__ == "__main__":
    sys.exit(main())
