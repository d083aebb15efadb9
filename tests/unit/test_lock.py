"""The lock of a family's folder, and weights that are not finite."""

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from panorama.modes import load
from panorama.weights import WeightsError, verify
from panorama.weights.__main__ import main
from panorama.weights.lock import LOCK, files, hashes, read_lock
from tests.small_safety import save_checker

WEIGHTS = Path(__file__).parents[2] / "weights"
NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny", symlinks=True))


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_the_locks_of_the_repository_are_those_of_its_files(name: str) -> None:
    """If not, run python -m panorama.weights --lock on the family's folder."""
    folder = WEIGHTS / name
    tracked = subprocess.run(
        ["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True
    )
    locked = read_lock(folder / LOCK)
    assert locked == hashes(folder, list(locked))
    assert {*tracked.stdout.split()} - {"README.md", LOCK} <= {*locked, "sdxl/vae", "sdxl/tiny_vae"}


def test_sha256sum_reads_a_lock(family: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", LOCK]
    assert subprocess.run(command, cwd=family, capture_output=True).returncode == 0


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"~"),
        f"sd2/unet/{NETWORK}",
        "has hash",
    ),
    "a tokenizer removed": (Path.unlink, "sdxl/tokenizer/tokenizer.json", "is missing"),
    "a LoRA removed": (Path.unlink, "sdxl/lora.safetensors", "is missing"),
    "a link removed": (lambda path: path.parent.unlink(), "sdxl/vae/config.json", "is missing"),
    "added": (lambda path: path.write_text("{}"), "sd2/unet/more.json", "is not in SHA256SUMS"),
    "a base added": (
        lambda path: (path.parent.mkdir(), path.write_text("{}")),
        "sd3/config.json",
        "is not in SHA256SUMS",
    ),
    "a default changed": (
        lambda path: path.write_text(path.read_text().replace("= 3.0", "= 3.5")),
        "family.toml",
        "has hash",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_family_is_refused_until_it_is_locked_anew(family: Path, change: str) -> None:
    verify(str(family))
    spoil, name, problem = CHANGES[change]
    spoil(family / name)
    with pytest.raises(WeightsError, match=rf"'{name}' {problem}.*panorama\.weights --lock"):
        load(str(family), device="cpu")
    assert main(["--lock", str(family)]) == 0
    verify(str(family))


def test_what_is_not_read_may_change(family: Path) -> None:
    (family / "README.md").unlink()
    (family / "sd2" / ".DS_Store").touch()
    verify(str(family))


def test_a_copy_without_links_is_verified_too(tmp_path: Path) -> None:
    """As in a wheel."""
    family = shutil.copytree(WEIGHTS / "tiny", tmp_path / "tiny")
    verify(str(family))
    (family / "sdxl" / "vae" / NETWORK).write_bytes(b"spoilt")
    with pytest.raises(WeightsError, match="sdxl/vae"):
        verify(str(family))


def test_a_safety_checker_of_the_deployer_may_be_added_and_locked(
    family: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checker(family / "safety_checker", 2.0)
    (family / "licences").mkdir()
    (family / "licences" / "LICENSE").touch()
    with caplog.at_level(logging.INFO):
        verify(str(family))
    assert caplog.messages == [
        f"{family}: files in licences, safety_checker that {LOCK} does not list are not verified"
    ]
    main(["--lock", str(family)])
    (family / "safety_checker" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"safety_checker/config\.json' is missing"):
        verify(str(family))


def test_a_family_without_a_lock_loads_and_says_so(
    family: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (family / LOCK).unlink()
    with caplog.at_level(logging.INFO, "panorama"):
        load(str(family), modes=["syncdiffusion"], device="cpu")
    (message,) = caplog.messages
    assert message.startswith(f"{family} has no {LOCK}, so its files are not verified")


def test_only_a_family_is_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--lock", str(tmp_path)])
    assert "a folder with a family.toml" in capsys.readouterr().err
    assert files(tmp_path) == []


# --- weights that are not finite ---

SPOILT = {
    "sd2/unet": (NETWORK, "UNet2DConditionModel", torch.nan),
    "sd2/text_encoder": ("model.safetensors", "CLIPTextModel", torch.inf),
    "sd2/vae": (NETWORK, "AutoencoderKL", -torch.inf),
    "sd2/tiny_vae": (NETWORK, "AutoencoderTiny", torch.nan),
    "perceptual": (NETWORK, "LPIPS", torch.nan),
}


def spoil(path: Path, value: float) -> str:
    """Put a value into a weight of a file, and return its name."""
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] = value
    save_file(weights, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", SPOILT)
def test_a_weight_that_is_not_finite_is_refused(family: Path, part: str) -> None:
    name, network, value = SPOILT[part]
    weight = spoil(family / part / name, value)
    (family / LOCK).unlink()
    with pytest.raises(WeightsError, match=rf"sd2: the weight {weight}.* of its {network}"):
        load(str(family), modes=["syncdiffusion"], device="cpu")


@pytest.mark.parametrize("name", ["lora", "embeddings"])
def test_a_lora_that_is_not_finite_is_refused(family: Path, name: str) -> None:
    spoil(family / "sdxl" / f"{name}.safetensors", torch.nan)
    (family / LOCK).unlink()
    with pytest.raises((WeightsError, ValueError), match="holds NaN"):
        load(str(family), modes=["sdxl-360"], device="cpu")


def test_a_safety_checker_that_is_not_finite_is_refused(family: Path) -> None:
    """It would flag nothing."""
    save_checker(family / "safety_checker", 2.0)
    spoil(family / "safety_checker" / "model.safetensors", torch.nan)
    with pytest.raises(WeightsError, match="safety_checker"):
        load(str(family), modes=["syncdiffusion"], device="cpu")
