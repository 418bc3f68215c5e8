"""Bad samples in whole runs: listed at the end by loader processes and by every rank, with one order of samples."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import golden
from train_kit import argv, recording

from llava.data.skipped_samples import SkippedSamples
from llava.errors import InputError
from llava.train.train import train


@pytest.fixture(autouse=True)
def _in_the_folder_of_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden("training.json").parent)


def test_a_run_that_skips_lists_what_it_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = recording("train_data/finetune.json")
    bad = {"id": "gone", "image": "absent.png", "conversations": samples[0]["conversations"]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*samples[:3], bad]))
    flags = {"data_path": data, "max_steps": 2, "dataloader_num_workers": 2}
    with caplog.at_level(logging.WARNING, "llava"):
        trainer = train(argv=argv(tmp_path / "out", **flags, on_bad_sample="skip"))
    assert trainer.state.global_step == 2
    assert "1 bad samples were skipped" in caplog.text
    assert "sample 3 (id 'gone'): there is no image file" in caplog.text


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known: stop, skip"):
        train(argv=argv(tmp_path, on_bad_sample="skp"))


def _report(rank: int, meeting: str, pipe: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    bad = SkippedSamples(5)
    bad.note(1 + 2 * rank)
    pipe.send((rank, bad.report(lambda index: InputError(f"sample {index}: gone"))))
    torch.distributed.destroy_process_group()


def test_every_rank_knows_what_all_ranks_skipped(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_report, args=(rank, str(tmp_path / "meeting"), theirs)) for rank in range(2)]
    for process in processes:
        process.start()
    reports = dict(ours.recv() for _ in processes)
    for process in processes:
        process.join()
    assert reports[0] == reports[1]
    assert reports[0].splitlines()[1:] == ["  sample 1: gone", "  sample 3: gone"]
