"""`llava trace` of a training step, and as a program: its views, its debugger, its words for wrong calls."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from cli_kit import run_llava, run_python
from faults import SAMPLES
from golden_data import HERE, golden
from repository import ROOT, blocks
from trace_kit import ANSWERING, QUESTION, TRAINING, star

import llava
from llava.assets import embedded_model_path
from llava.diagnose import trace as trace_program
from llava.diagnose.tracer.generation import trace_question
from llava.diagnose.tracer.hooks import Trace
from llava.diagnose.tracer.record import POINTS
from llava.diagnose.tracer.training import trace_sample
from llava.model.builder import LoadedModel, load


@pytest.fixture(autouse=True)
def among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load(embedded_model_path(), device="cpu")


# Training samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "samples.json"
    file.write_text(json.dumps(SAMPLES))
    return str(file)


def sample(samples: str, *flags: str, index: int = 1, model: str = "llava-v1.5-tiny-vicuna") -> Trace:
    flags = flags or ("--mm_projector_lr", "1e-5")
    return trace_sample(
        samples, index, model_path=str(golden(f"checkpoints/{model}")), image_folder="images", flags=flags
    )


def test_a_training_sample_passes_every_point(samples: str) -> None:
    seen = sample(samples)
    assert [point.point for point in seen] == TRAINING
    assert seen.failed == []
    assert seen["sample"]["id"] == "text"
    assert seen["labels"].rows[0].text.endswith("In how many words? ASSISTANT:[ One.</s>]")
    row = seen["splice"]["rows"][0]
    assert row["expected"] == row["text"] + 16
    assert row["trained"] == seen["labels"]["trained"] == len(seen["loss"]["tokens"])
    groups = {tuple(group["parts"]): group["lr"] for group in seen["optimizer"]["groups"]}
    assert groups == {("language model",): 5e-5, ("projector",): 1e-5}


def test_loss_and_gradients_are_those_of_a_plain_step(samples: str) -> None:
    seen = sample(samples)
    assert seen["gradients"]["vision tower"]["trained"] == 0
    model = seen.model
    names = ("input_ids", "labels", "attention_mask", "images")
    from llava.train.data import DataCollatorForSupervisedDataset

    item = {key: torch.tensor(seen["labels"][key]) for key in ("input_ids", "labels")}
    image = llava.mm_utils.process_images(seen.images, model.get_vision_tower().image_processor, model.config)[0]
    batch = DataCollatorForSupervisedDataset(seen.tokenizer)([{**item, "image": image}])
    loss = model.eval()(**{name: batch[name] for name in names}).loss
    loss.backward()
    assert seen["loss"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for part, key in (("projector", "mm_projector"), ("language model", "layers.")):
        squares = sum(
            float(p.grad.pow(2).sum()) for n, p in model.named_parameters() if key in n and p.grad is not None
        )
        if part == "projector":
            assert seen["gradients"][part]["norm"] == pytest.approx(squares**0.5, rel=1e-4)
        else:
            assert seen["gradients"][part]["norm"] > 0


def test_a_frozen_language_model_and_a_text_sample(samples: str) -> None:
    seen = sample(samples, "--tune_mm_mlp_adapter", "True", index=2)
    assert seen["arguments"]["trained_by_part"].keys() == {"projector"}
    assert seen["gradients"]["language model"]["trained"] == 0
    # A text sample brings a black image that is in no position of the sequence, so the projector has nothing to learn.
    assert [part["kind"] for part in seen["splice"]["rows"][0]["segments"]] == ["text"]
    assert seen.failed == [("gradients", "it is to be trained and gets no gradient, or no finite one")]


def test_a_configuration_file_decides_the_run(samples: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: checkpoints/llava-v1.5-tiny-vicuna\nversion: v1\nlearning_rate: 3e-4\n")
    seen = trace_sample(
        samples, 0, model_path="unused", image_folder="images", flags=[str(file), "--freeze_backbone", "True"]
    )
    assert seen["arguments"]["learning_rate"] == 3e-4
    assert "layers" in seen


# The program


def test_the_terminal_view_has_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_program.main([str(ROOT / "images/demo.jpg"), QUESTION]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text
    assert [line.split()[1] for line in text.splitlines() if line[:2].strip().isdigit()] == ANSWERING
    for words in ("1 354 355 356 259 -200", "14 text + 64 image = 78", "▁yellow 100.0%", "all 16 checks hold"):
        assert words in text


@pytest.mark.parametrize("page", ["docs/trace.md", "docs/trace.zh-CN.md"])
def test_what_the_page_shows_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(block.text for block in blocks(ROOT / page) if block.kind == "text")
    trace_program.main([str(ROOT / "images/demo.jpg"), QUESTION])
    printed = capsys.readouterr().out.splitlines()
    for line in shown.splitlines():
        assert line in printed


def test_the_pages_list_every_point() -> None:
    for page in ("docs/trace.md", "docs/trace.zh-CN.md"):
        rows = [
            row.split("`")[1] for row in (ROOT / page).read_text(encoding="utf-8").splitlines() if row.startswith("| `")
        ]
        assert rows == list(POINTS)


def test_json_has_the_same_facts(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_program.main([str(ROOT / "images/demo.jpg"), QUESTION, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["answer"] == "The star is yellow."
    assert [point["point"] for point in content["points"]] == ANSWERING
    assert content["failed"] == []
    words = ["--data", samples, "-m", "checkpoints/llava-v1.5-tiny-vicuna", "--image-folder", "images", "--json"]
    assert trace_program.main(words) == 0
    assert [point["point"] for point in json.loads(capsys.readouterr().out)["points"]] == TRAINING


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.parametrize(
    ("point", "command", "shown"),
    [
        ("arguments", "loaded.context_len", "1024"),
        ("pixels", "tuple(pixels.shape)", "(1, 3, 112, 112)"),
        ("input_ids", "input_ids.index(-200)", "5"),
        ("text", "answer.text", "'The star is yellow.'"),
    ],
)
def test_break_opens_the_debugger_at_a_point(
    point: str,
    command: str,
    shown: str,
    embedded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(monkeypatch, f"p {command}", "c", "c")
    trace_question(embedded, [star()], QUESTION, break_at=point)
    out = capsys.readouterr().out
    assert f"stopped at {point}" in out
    assert f"(Pdb) {shown}" in out


@pytest.mark.slow
def test_break_inside_of_generation_and_leave() -> None:
    """In a process of its own: the model runs in a thread there."""
    words = ["trace", str(ROOT / "images/demo.jpg"), QUESTION, "--break", "splice"]
    done = run_llava(*words, stdin="p int(batch.mask.sum())\nc\n")
    assert "(Pdb) 78" in done.stdout
    assert "all 16 checks hold" in done.stdout
    assert done.returncode == 0
    left = run_llava(*words, stdin="q\n")
    assert left.returncode == 1
    assert "Traceback" not in left.stderr


def test_break_in_a_training_step(
    samples: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "p tuple(logits.shape)[-1]", "q")
    words = [
        "--data",
        samples,
        "-m",
        "checkpoints/llava-v1.5-tiny-vicuna",
        "--image-folder",
        "images",
        "--break",
        "loss",
    ]
    assert trace_program.main(words) == 1
    assert "(Pdb) 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say what to ask"),
        (["images/square_56x56.png"], "say what to ask"),
        (["What?", "--break", "nowhere"], "no point 'nowhere'"),
        (["What?", "--", "--lora_r", "8"], "--data"),
        (["What?", "--data", "train_data/finetune.json"], "not both"),
        (["--data", "train_data/finetune.json", "--image-folder", "images", "--index", "999"], "--index 999"),
        (["images/square_56x56.png", "What?", "-m", "checkpoints/vicuna-tiny-base"], "without a vision tower"),
    ],
)
def test_a_wrong_call_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_program.main(words) == 2
    errors = capsys.readouterr().err
    assert sentence in errors.splitlines()[-1]


def test_help_needs_no_torch() -> None:
    code = "import sys; from llava.diagnose import doctor, trace; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0
