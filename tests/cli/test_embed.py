"""`llava embed`: its files have the engine's vectors, in order, and what it cannot use is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.assets import embedded_model_path
from llava.cli.embed import main
from llava.engine.engine import Engine
from llava.engine.request import EmbedRequest
from llava.model.builder import load
from llava.session import LoadedImage, Session


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load(embedded_model_path(), device="cpu")


@pytest.fixture(scope="module")
def engine(loaded: Any) -> Iterator[Engine]:
    with Engine.from_loaded(loaded) as engine:
        yield engine


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    for number, name in enumerate(("b.png", "a.PNG", "inner/c.webp")):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


def opened(file: Path) -> Any:
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("stage", ["tower", "projector"])
def test_a_folder_of_images(photos: Path, tmp_path: Path, engine: Engine, stage: Any) -> None:
    assert main([str(photos), "--stage", stage, "--out", str(tmp_path / "v.npy")]) == 0
    names = json.loads((tmp_path / "v.json").read_text())
    assert names == [str(photos / name) for name in ("a.PNG", "b.png", "inner/c.webp")]
    wanted = engine.embed([EmbedRequest(images=[opened(Path(name))], stage=stage) for name in names])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), [made.vectors[0] for made in wanted], atol=1e-5)


def test_a_question_about_each_image(photos: Path, tmp_path: Path, engine: Engine, loaded: Any) -> None:
    from pyarrow import parquet

    out = tmp_path / "v.parquet"
    flags = ["--prompt", "What is it?", "--pooling", "last", "--layer", "3", "--normalize"]
    assert main([str(photos / "b.png"), *flags, "--out", str(out)]) == 0
    session = Session(loaded)
    session.attach([LoadedImage.open(photos / "b.png")])
    conversation = session.conversation("What is it?")
    request = EmbedRequest(conversation, [opened(photos / "b.png")], layer=3, pooling="last", normalize=True)
    table = parquet.read_table(out)
    assert table["name"].to_pylist() == [str(photos / "b.png")]
    np.testing.assert_allclose(table["vector"].to_pylist()[0], engine.embed(request).vectors[0], atol=1e-5)


def test_lines_of_text_of_which_two_are_equal(tmp_path: Path, engine: Engine) -> None:
    texts = ["a red circle", "zwei Hunde", "a red circle"]
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    assert main(["--texts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "t.npz")]) == 0
    with np.load(tmp_path / "t.npz") as written:
        assert written["names"].tolist() == texts
        wanted = [engine.embed(EmbedRequest(text)).vectors[0] for text in texts]
        np.testing.assert_allclose(written["vectors"], wanted, atol=1e-5)


def test_an_unreadable_image_stops_it_or_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.jpg", tmp_path / "v.npy"
    bad.write_bytes(b"bad")
    words = [str(bad), str(photos / "b.png"), "--out", str(out)]
    assert main(words) == 2
    assert not list(tmp_path.glob("v*"))
    assert main([*words, "--skip-unreadable"]) == 0
    assert "bad.jpg" in capsys.readouterr().err
    assert json.loads((tmp_path / "v.json").read_text()) == [str(photos / "b.png")]
    assert main([str(bad), "--skip-unreadable", "--out", str(tmp_path / "w.npy")]) == 2
    before = out.read_bytes()
    assert main([str(photos), "--out", str(out)]) == 2  # it exists
    assert out.read_bytes() == before
    assert main([str(photos), "--out", str(out), "--overwrite"]) == 0
    assert len(np.load(out)) == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{photos}", "--out", "v.csv"], "ending"),
        (["{photos}", "--out", "nowhere/v.npy"], "no folder"),
        (["--out", "v.npy"], "nothing to embed"),
        (["{photos}/notes.txt", "--out", "v.npy"], "notes.txt"),
        (["{photos}/inner", "{photos}/inner/c.webp", "--out", "v.npy"], "twice"),
        (["{photos}", "--stage", "tower", "--layer", "2", "--out", "v.npy"], "--layer"),
        (["{photos}", "--stage", "tower", "--prompt", "x", "--out", "v.npy"], "--prompt"),
        (["{photos}", "--prompt", "x", "--layer", "70", "--out", "v.npy"], "layer is 70"),
        (["--texts", "{photos}/b.png", "--out", "v.npy"], "UTF-8"),
        (["--texts", "{photos}/notes.txt", "{photos}", "--out", "v.npy"], "--texts"),
        (["--texts", "none.txt", "--out", "v.npy"], "none.txt"),
    ],
)
def test_what_cannot_be_used_is_refused(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(photos=photos) for word in words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
