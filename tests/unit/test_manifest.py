"""weights/manifest.toml: complete, legal, and in step with the modes and with the repository."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pytest

from panorama import weights
from panorama.jobs import MODES
from panorama.weights.manifest import File, Part, Source, read_manifest

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights"
FULL = read_manifest(WEIGHTS / "manifest.toml")["full"]
SIZES = {
    "syncdiffusion": (2048, 512),
    "syncdiffusion-xl": (2048, 1024),
    "sdxl-360": (1024, 512),
}
COMPONENTS = {
    "sd2": {"text_encoder", "tiny_vae", "tokenizer", "unet", "vae"},
    "sdxl": {
        *("controlnet", "embeddings.safetensors", "lora.safetensors", "scheduler", "text_encoder"),
        *("text_encoder_2", "tiny_vae", "tokenizer", "tokenizer_2", "unet", "vae"),
    },
    "perceptual": {"vgg16.pth"},
}
SINGLE_FILES = {
    "embeddings.safetensors": "embeddings.pti",
    "lora.safetensors": "lora.safetensors",
    "vgg16.pth": "vgg16-397923af.pth",
}
TOKENIZER = {"merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}


def components(parts: Iterable[Part], base: str) -> dict[str, list[PurePosixPath]]:
    """Return the names of the files of each component of a base model."""
    found: dict[str, list[PurePosixPath]] = {}
    for part in parts:
        for file in part.files if part.base == base else ():
            found.setdefault(file.component, []).append(PurePosixPath(file.name))
    return found


def write(tmp_path: Path, old: str, new: str) -> Path:
    text = (WEIGHTS / "manifest.toml").read_text()
    assert old in text
    path = tmp_path / "manifest.toml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("family", ["full", "tiny"])
def test_a_family_has_every_mode(family):
    defaults = weights.describe(family)
    assert set(defaults) == set(MODES)
    assert all(set(own) == {"width", "height", "guidance_scale"} for own in defaults.values())


def test_full_has_its_modes_in_their_published_sizes():
    defaults = weights.describe("full")
    assert {mode: (own["width"], own["height"]) for mode, own in defaults.items()} == SIZES
    assert {own["guidance_scale"] for own in defaults.values()} == {7.5}


@pytest.mark.parametrize("base", COMPONENTS)
def test_a_base_model_is_complete(base):
    assert set(components(FULL, base)) == COMPONENTS[base]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_needs_its_base_model_and_what_synchronises_it(mode):
    needed = weights.needed("full", [mode])
    bases = {MODES[mode].base} | ({"perceptual"} if MODES[mode].synchronised else set())
    assert {each.base for each in needed} == bases
    assert all(set(components(needed, base)) == COMPONENTS[base] for base in bases)


@pytest.mark.parametrize(
    ("base", "name"), [(b, name) for b in COMPONENTS for name in sorted(COMPONENTS[b])]
)
def test_a_component_has_what_a_loader_reads(base, name):
    names = components(FULL, base)[name]
    assert len({name.parent for name in names}) == 1
    if name.startswith("tokenizer"):
        expected = TOKENIZER
    elif name == "scheduler":
        expected = {"scheduler_config.json"}
    elif PurePosixPath(name).suffix:
        expected = {SINGLE_FILES[name]}
    else:
        stem = "model" if "text_encoder" in name else "diffusion_pytorch_model"
        expected = {"config.json", f"{stem}.safetensors"}
    assert {name.name.replace(".fp16.", ".") for name in names} == expected


@pytest.mark.parametrize("part", FULL, ids=lambda part: part.sources[0].repository)
def test_nothing_is_a_guess(part):
    assert part.licence
    for source in part.sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
        assert re.fullmatch("[0-9a-f]{40}", source.revision)
    for file in part.files:
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        if file.name.endswith((".safetensors", ".pth")):
            assert file.sha256 and file.size


def test_vgg16_is_the_only_pickle():
    safe = {".json", ".txt", ".safetensors", ".pti"}
    pickles = {
        (source.url, file.name)
        for part in FULL
        for source in part.sources
        for file in part.files
        if PurePosixPath(file.name).suffix not in safe
    }
    assert pickles == {("https://download.pytorch.org/models", "vgg16-397923af.pth")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence =", "license =", "license"),
        ("modes =", "mode =", "mode"),
        ("{ name =", "{ nam =", "name"),
        ("revision =", "version =", "version"),
        (', sha256 = "397923af', ', sha = "397923af', "'sha'"),
        ("[full.sd2]", "[full.sd2", "line"),
    ],
)
def test_a_broken_manifest_is_refused_with_its_path(tmp_path, old, new, message):
    path = write(tmp_path, old, new)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*{message}"):
        read_manifest(path)


def test_a_file_belongs_to_its_folder_its_part_or_what_it_says(tmp_path):
    path = tmp_path / "manifest.toml"
    path.write_text(
        """
        [small.part]
        base = "sd2"
        modes = ["syncdiffusion"]
        licence = "MIT"
        sources = [{ repository = "a/b", revision = "c" }]
        files = [{ name = "unet/config.json" }, { name = "x.pti", component = "x.safetensors" }]

        [small.other]
        base = "sdxl"
        modes = ["sdxl-360"]
        licence = "MIT"
        component = "vae"
        sources = [{ repository = "c/d", revision = "e" }]
        files = [{ name = "config.json", size = 3, sha256 = "f" }]
        """
    )
    part = {"modes": ("syncdiffusion",), "licence": "MIT", "sources": (Source("a/b", "c"),)}
    assert read_manifest(path)["small"] == (
        Part(
            "sd2", files=(File("unet/config.json", "unet"), File("x.pti", "x.safetensors")), **part
        ),
        Part(
            "sdxl",
            modes=("sdxl-360",),
            licence="MIT",
            files=(File("config.json", "vae", 3, "f"),),
            sources=(Source("c/d", "e"),),
        ),
    )


def test_a_family_that_is_a_folder_has_the_components_that_are_in_it(tmp_path, monkeypatch):
    monkeypatch.delenv("PANORAMA_WEIGHTS", raising=False)
    tiny = WEIGHTS / "tiny"
    for family in ("tiny", str(tiny)):
        paths = weights.components(family, "sdxl")
        assert paths == {path.name: path for path in (tiny / "sdxl").iterdir()}
        assert weights.components(family, "perceptual") == {"perceptual": tiny / "perceptual"}
        weights.require(family)
        ranges = {mode: [*pair] for mode, pair in weights.usual_ranges(family).items()}
        described = {**weights.describe(family), "limits": weights.limits(family)}
        described["intra_lpips"] = ranges
        assert described == tomllib.loads((tiny / "family.toml").read_text())
    assert weights.components(str(tmp_path), "sd2") == {}


def test_a_family_may_be_beside_the_cache_and_have_a_safety_checker(tmp_path, monkeypatch):
    (tmp_path / "own" / "safety_checker").mkdir(parents=True)
    defaults = {"width": 128, "height": 64, "guidance_scale": 3.0}
    lines = (f"{name} = {value}\n" for name, value in defaults.items())
    (tmp_path / "own" / "family.toml").write_text("[sdxl-360]\n" + "".join(lines))
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(tmp_path))
    assert weights.describe("own") == {"sdxl-360": defaults}
    assert weights.safety_checker("own") == tmp_path / "own" / "safety_checker"
    assert weights.safety_checker("tiny") is None


def test_an_unknown_family_is_refused_with_those_that_there_are():
    with pytest.raises(FileNotFoundError, match=r"'huge'.*full, tiny"):
        weights.describe("huge")


def test_the_repository_has_what_full_does_not_fetch():
    assert (WEIGHTS / "full" / "sd2" / "scheduler" / "scheduler_config.json").is_file()
