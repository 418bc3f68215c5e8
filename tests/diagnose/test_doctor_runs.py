"""`llava doctor` on data, training runs and servers: broken ones are named by their cause, good ones have no findings."""

from __future__ import annotations

import copy
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import faults
import pytest
import torch
from golden_data import HERE, golden

from llava.data.reader import read_model
from llava.diagnose import doctor as program
from llava.diagnose.checks.dataset import examine_data
from llava.diagnose.checks.findings import DoctorReport
from llava.diagnose.checks.server import examine_server
from llava.diagnose.checks.training_config import examine_training


@pytest.fixture(autouse=True)
def among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_samples(file: Path, change: faults.Change = lambda samples: None) -> Path:
    samples = copy.deepcopy(faults.SAMPLES)
    change(samples)
    file.write_text(json.dumps(samples))
    return file


def examine_samples(file: Path) -> DoctorReport:
    return examine_data(file, image_folder="images", reader=read_model(golden(f"checkpoints/{faults.VICUNA}")))


def test_good_data_is_healthy(tmp_path: Path) -> None:
    report = examine_samples(write_samples(tmp_path / "samples.json"))
    assert report.codes == []
    assert report.facts == {"samples": 3, "bad_samples": 0}


@pytest.mark.parametrize("name", faults.DATA_FAULTS)
def test_bad_data_is_named_by_its_cause(name: str, tmp_path: Path) -> None:
    change, code = faults.DATA_FAULTS[name]
    report = examine_samples(write_samples(tmp_path / "samples.json", change))
    assert report.codes == [code], report.findings
    assert report.findings[0].evidence["samples"] == 1


def test_a_file_that_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"not": "a list"')
    assert examine_samples(tmp_path / "samples.json").codes == ["data-unreadable"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recordings, and what the runs of faults.py need beside them."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "checkpoints").mkdir()
    for place in sorted((HERE / "checkpoints").iterdir()):
        (folder / "checkpoints" / place.name).symlink_to(place)
    (folder / "images").symlink_to(HERE / "images")
    (folder / "train_data").mkdir()
    write_samples(folder / "train_data/samples.json")
    for name, change in (("wide", widened), ("bf16", in_bfloat16)):
        shutil.copytree(HERE / "checkpoints/vicuna-tiny-base", folder / "checkpoints" / name)
        change(folder / "checkpoints" / name)
    return folder


def widened(folder: Path) -> None:
    faults.config(hidden_size=96)(folder)
    wide = {"model.embed_tokens.weight": torch.full((1000, 96), 0.1), "lm_head.weight": torch.full((1000, 96), 0.1)}
    faults.tensors(lambda table: table.update(wide), "pytorch_model.bin")(folder)


def in_bfloat16(folder: Path) -> None:
    cast = faults.tensors(
        lambda table: table.update({name: tensor.bfloat16() for name, tensor in table.items()}), "pytorch_model.bin"
    )
    cast(folder)


GOOD_RUNS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "pretrain": {
        "version": "plain",
        "tune_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": None,
        "data_path": "captions.json",
    },
    "lora": {"lora_enable": True},
    "go on": faults.GO_ON,
    "go on with its own tower": {**faults.GO_ON, "vision_tower": None},
    "for a GPU": {"fp16": True},
}


@pytest.mark.parametrize("name", GOOD_RUNS)
def test_good_runs_are_healthy(name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    captions = [{**sample, "conversations": sample["conversations"][:2]} for sample in faults.SAMPLES[:2]]
    (workplace / "captions.json").write_text(json.dumps(captions))
    report = examine_training(faults.write_run(tmp_path / "run.yaml", **GOOD_RUNS[name]))
    assert report.codes == [], report.findings
    assert report.skipped == []


@pytest.mark.parametrize("name", faults.RUN_FAULTS)
def test_a_bad_run_is_named_by_its_cause(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    changes, code = faults.RUN_FAULTS[name]
    report = examine_training(faults.write_run(tmp_path / "run.yaml", **changes))
    assert report.codes == [code], report.findings
    assert report.findings[0].evidence


def test_fix_repairs_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(samples: list[dict[str, Any]]) -> None:
        faults.turn(0, 0, value="What colours do you see?")(samples)
        samples[1].update(id="gradient")
        samples[2]["conversations"].pop()

    file, copied = write_samples(tmp_path / "samples.json", change), tmp_path / "copy.json"
    assert program.main([str(file), "--image-folder", "images", "--fix", str(copied)]) == 1
    assert "nothing found" in capsys.readouterr().out
    repaired = json.loads(copied.read_text())
    assert [sample["id"] for sample in repaired] == ["gradient", "gradient-1"]
    assert repaired[0]["conversations"][0]["value"] == "<image>\nWhat colours do you see?"
    assert len(json.loads(file.read_text())) == 3


def test_fix_repairs_a_run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    file = faults.write_run(tmp_path / "run.yaml", mm_vision_select_layer=-1)
    program.main([str(file), "--fix", str(tmp_path / "copy.yaml")])
    assert examine_training(tmp_path / "copy.yaml").codes == []


# Servers


class FakeServer(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that can be broken: `faults` are names of what it does wrong."""

    faults: ClassVar[set[str]] = set()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if "unhealthy" in self.faults else 200, {})
        elif self.path == "/v1/models" and "worker" not in self.faults:
            self.answer(200, {"data": [] if "no model" in self.faults else [{"id": "llava"}]})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/worker_get_status":
            self.answer(200, {"model_names": ["llava-worker"], "speed": 1, "queue_length": 0})
            return
        if "fails" in self.faults:
            self.answer(500, {"error": {"message": "out of memory"}})
            return
        has_image = any(part["type"] == "image_url" for part in body["messages"][0]["content"])
        text = "" if has_image and "empty" in self.faults else "A red circle." + "</s>" * ("special" in self.faults)
        if body["stream"]:
            pieces = ["A ", "A red ", "A red circle."] if "stream" in self.faults else ["A ", "red ", "circle."]
            events = [f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n" for piece in pieces]
            self.send(200, "".join([*events, "data: [DONE]\n\n"]))
            return
        tokens = 20 + 64 * (has_image and "blind" not in self.faults)
        choices = [{"message": {"content": text}}]
        self.answer(200, {"choices": choices, "usage": {"prompt_tokens": tokens}})

    def answer(self, status: int, content: Any) -> None:
        self.send(status, json.dumps(content))

    def send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("fault", faults.SERVER_FAULTS)
def test_a_broken_server_is_named_by_its_cause(fault: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "faults", {fault})
    report = examine_server(address)
    assert report.codes == [faults.SERVER_FAULTS[fault][0]], report.findings


def test_good_servers_are_healthy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "faults", set())
    report = examine_server(f"{address}/v1")
    assert (report.codes, report.skipped) == ([], [])
    monkeypatch.setattr(FakeServer, "faults", {"worker"})
    worker = examine_server(address)
    assert worker.codes == []
    assert worker.facts == {"model": "llava-worker", "interface": "worker"}


def test_nothing_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert examine_server(f"http://127.0.0.1:{port}", timeout=5).codes == ["server-unreachable"]
