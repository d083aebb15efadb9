"""Fetch the weights of `full` into a hub cache, and verify them; or lock a family's folder."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from panorama.weights import Modes, WeightsError, ensure_weights, manifest, needed, require
from panorama.weights.hub import Cache
from panorama.weights.lock import LOCK, write_lock


def listing(family: str, modes: Modes, folder: Path | None) -> Iterator[str]:
    """Yield lines with the source, licence, names and sizes of the files that modes need."""
    cache, total = Cache(folder), 0
    for part in needed(family, modes):
        yield f"{part}: {part.licence}, for {', '.join(part.modes)}"
        absent = {file for file, _ in cache.lacking(part, thorough=False)}
        for file in part.files:
            size = tqdm.format_sizeof(file.size, "B", 1000) if file.size else "?"
            yield f"{size:>10}  {file.name}{'' if file in absent else ', here'}"
        total += sum(file.size or 0 for file in absent)
    yield f"{tqdm.format_sizeof(total, 'B', 1000)} to fetch into {cache.folder}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 when weights are missing or wrong, 130 if it was interrupted. Bad
        arguments exit with 2.
    """
    parser = argparse.ArgumentParser(prog="fetch-weights", description=__doc__)
    parser.add_argument("--mode", action="append", dest="modes", help="only the files of this mode")
    parser.add_argument("--dir", type=Path, help="defaults to PANORAMA_WEIGHTS or the hub's cache")
    parser.add_argument("--list", action="store_true", help="list the files, without a request")
    parser.add_argument("--offline", action="store_true", help="only verify, without a request")
    parser.add_argument(
        "--lock", type=Path, metavar="FOLDER", help=f"only write {LOCK} into a family's folder"
    )
    options = parser.parse_args(arguments)
    if options.lock:
        if not (options.lock / "family.toml").is_file():
            parser.error(f"--lock {options.lock}: must be a folder with a family.toml")
        print(write_lock(options.lock))
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("panorama").setLevel(logging.INFO)
    try:
        for family in manifest():
            offered = sorted({mode for part in needed(family) for mode in part.modes})
            for mode in set(options.modes or ()) - set(offered):
                parser.error(f"--mode {mode}: must be one of {', '.join(offered)}")
            if options.list:
                print(*listing(family, options.modes, options.dir), sep="\n")
                continue
            obtain = require if options.offline else ensure_weights
            obtain(family, options.modes, options.dir, thorough=True)
            names = ", ".join(options.modes or [family])
            print(f"{Cache(options.dir).folder}: every file for {names} is present and verified")
    except (WeightsError, ValueError) as error:
        print(f"fetch-weights: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
