"""A report that is written again with each figure, so that a run that is cut short still tells."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import Goal
from benchmarks.lab import Lab

GOALS = {
    ("published", "exact: times as fast as the published loop"): Goal(least=2),
    ("published", "fast: times as fast as the published loop"): Goal(least=12),
    ("published", "exact: seconds"): Goal(most=25),
    ("published", "fast: seconds"): Goal(most=3),
    ("diffusers", "no sync: times as fast as diffusers"): Goal(least=1.2),
    ("memory", "exact, checkpointing: GB"): Goal(most=14),
    ("memory", "fast: GB"): Goal(most=8),
    ("peak", "UNet in fast: share of the data sheet"): Goal(least=0.35),
    ("outside", "fast: share outside the networks"): Goal(most=0.03),
    ("outside", "exact, a sync step in ten: share outside the networks"): Goal(most=0.03),
    ("sdxl-360", "text: time, share of the stock pipeline's"): Goal(most=1.05),
    ("sdxl-360", "depth: time, share of the stock pipeline's"): Goal(most=1.05),
}
"""The goal of each figure of a row; in a dry run it means nothing."""


@dataclass
class Result:
    """The result of a row."""

    status: str = "cut short"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """All rows so far, in a folder as report.json and report.md."""

    folder: Path
    environment: dict[str, Any]
    rows: dict[str, Result] = field(default_factory=dict)

    def write(self) -> None:
        """Write both files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = {name: asdict(result) for name, result in self.rows.items()}
        text = json.dumps({"environment": self.environment, "rows": rows}, indent=2)
        for name, content in {"report.json": text, "report.md": self.markdown()}.items():
            part = self.folder / f"{name}.part"
            part.write_text(content + "\n")
            part.replace(self.folder / name)

    def markdown(self) -> str:
        """Return a table of all rows."""
        lines = ["# GPU report", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        lines += ["", "| | | value | goal |", "|---|---|---|---|"]
        for row, result in self.rows.items():
            lines.append(f"| **{row}** | {cell(result.status)} | {result.seconds:.1f} s | |")
            for name, value in result.figures.items():
                goal = None if self.environment["dry run"] else GOALS.get((row, name))
                note = f"{goal}: {'met' if goal.met(value) else 'missed'}" if goal else ""
                lines.append(f"| | {cell(name)} | {cell(show(value))} | {note} |")
        return "\n".join(lines)


def show(value: Any) -> str:
    """Return a value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(text: str) -> str:
    """Return a text that a cell of a table can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def environment_of(lab: Lab) -> dict[str, Any]:
    """Return what the figures depend on."""
    names = ("torch", "diffusers", "transformers")
    found: dict[str, Any] = {"device": platform.machine(), "dry run": lab.dry}
    if lab.cuda:
        properties = torch.cuda.get_device_properties(lab.device)
        found |= {
            "device": properties.name,
            "memory, GB": round(properties.total_memory / 1e9, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    found |= {"half precision": str(lab.dtype).removeprefix("torch.")}
    found |= {"Python": platform.python_version(), "CPU threads": torch.get_num_threads()}
    return found | {name: version(name) for name in names}
