"""Errors of the system about a user's path, and packages that are absent: a sentence and status 2 from every command."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import CHECKPOINT, IMAGE, environment
from golden_data import HERE
from repository import PACKAGE, ROOT

from llava.__main__ import main
from llava.assets import embedded_model_path
from llava.cli.commands import COMMANDS
from llava.cli.program import run_program
from llava.errors import InputError, describe_system_error
from llava.files import atomic_folder, cache_folder, state_folder

LOGOS = ROOT / "playground/logos"
TRAIN = [
    *("--model_name_or_path", str(embedded_model_path()), "--data_path", str(LOGOS / "train.json")),
    *("--image_folder", str(LOGOS / "images"), "--max_steps", "1", "--report_to", "none"),
]
QUESTIONS = ["eval", "{q}/own.jsonl", "--data-dir", "{q}", "--limit", "1"]
LORA = ["merge", "--model-path", "checkpoints/llava-v1.5-tiny-lora", "--model-base", "checkpoints/vicuna-tiny-base"]

# Each command writes to a folder that cannot be written, {ro}; below {ro}/file, which is a file; or reads from there, where it
# writes nothing. The word is a part of the sentence.
REFUSED = {
    "chat": [["chat", "{ro}/file/a.png", "What?"]],
    "models": [],  # takes no path
    "completion": [],  # neither
    "pull": [["pull", "{ro}/file/model"]],
    "rm": [["rm", "{ro}/file/model"]],
    "cli": [["cli", "--model-path", CHECKPOINT, "--image-file", "{ro}/file/a.png"]],
    "serve": [["serve", CHECKPOINT, "--port", "0", "--log-dir", f"{{ro}}/{name}"] for name in ("new", "file/new")],
    "controller": [["controller", "--host", "{ro}/file", "--port", "0"]],
    "worker": [["worker", "--model-path", "{ro}/file"]],
    "web": [["web", "--port", "0", "--log-dir", f"{{ro}}/{name}"] for name in ("new", "file/new", "file")],
    "embed": [["embed", IMAGE, "--out", f"{{ro}}/{name}.npy"] for name in ("new", "file/new")],
    "bench": [["bench", "-m", "{ro}/file"]],
    "train": [["train", *TRAIN, "--output_dir", f"{{ro}}/{name}"] for name in ("new", "file/new", "file")],
    "examples": [["examples", f"{{ro}}/{name}"] for name in ("new", "file/new", "file")],
    "data": [["data", "check", "{ro}/file/train.json"]],
    "trace": [["trace", "-m", CHECKPOINT, IMAGE, "What?", "--html", f"{{ro}}/{name}"] for name in ("new", "file/new", "")],
    "doctor": [["doctor", "{ro}/file/model"]],
    "selftest": [["selftest", "{ro}/file"]],
    "eval": [[*QUESTIONS, "--out", f"{{ro}}/{name}"] for name in ("new", "file/new", "file")],
    "info": [["info", "{ro}/file/model"]],
    "convert": [["convert", CHECKPOINT, f"{{ro}}/{name}", "--to", "transformers"] for name in ("new", "file/new", "file")],
    "merge": [[*LORA, "--save-model-path", f"{{ro}}/{name}"] for name in ("new", "file/new", "file")],
}  # fmt: skip


def test_every_command_is_tried() -> None:
    assert set(REFUSED) == set(COMMANDS)


class CapabilitySets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@pytest.fixture
def without_rights_of_root() -> Iterator[None]:
    """Let permissions of files hold for root too, in this thread (Linux); for any other user they do already."""
    if os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (CapabilitySets * 2)()
    if library.capget(header, sets):
        pytest.skip("the rights of root cannot be dropped here")
    before = sets[0].effective
    sets[0].effective = before & ~0b110  # DAC_OVERRIDE and DAC_READ_SEARCH
    assert library.capset(header, sets) == 0
    yield
    sets[0].effective = before
    assert library.capset(header, sets) == 0


def run_in_process(arguments: list[str]) -> tuple[object, str]:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status: object = main(arguments)
        except SystemExit as ended:
            status = ended.code
    return status, err.getvalue()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities of Linux")
@pytest.mark.parametrize(
    "arguments", [row for rows in REFUSED.values() for row in rows], ids=lambda row: f"{row[0]} {row[-1]}"
)
def test_places_that_cannot_be_used(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_rights_of_root: None
) -> None:
    monkeypatch.chdir(HERE)
    read_only, questions = tmp_path / "read-only", tmp_path / "questions"
    read_only.mkdir()
    questions.mkdir()
    (read_only / "file").touch()
    read_only.chmod(0o555)
    row = {"question_id": 1, "image": str(HERE / IMAGE), "text": "What?", "answer": "x"}
    (questions / "own.jsonl").write_text(json.dumps(row) + "\n")
    try:
        with pytest.raises(PermissionError):
            (read_only / "new").touch()
        status, err = run_in_process([word.format(ro=read_only, q=questions) for word in arguments])
        assert status == 2, err
        assert "Traceback" not in err
        sentence = err.splitlines()[-1]
        assert sentence.startswith(f"llava {arguments[0]}")
        assert ": error: " in sentence
        assert "read-only" in sentence
        assert "incomplete-" not in sentence
        assert [path.name for path in read_only.iterdir()] == ["file"]
    finally:
        read_only.chmod(0o755)


def test_what_is_a_users_error_and_what_is_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int, *path: object) -> str | None:
        return describe_system_error(OSError(number, os.strerror(number), *path))

    for number in (
        errno.EACCES,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    ):
        said = fails(number, "some/where")
        assert said is not None
        assert "'some/where'" in said
        assert os.strerror(number).lower() in said
        assert fails(number) is None  # of no path
    assert "'some/where'" in (fails(errno.ENOSPC, "some/where") or "")
    assert "disk is full" in (fails(errno.ENOSPC) or "")
    assert "disk" in (describe_system_error(RuntimeError("write failed: No space left on device")) or "")
    ours = [str(PACKAGE / "none.json"), os.path.join(sysconfig.get_paths()["purelib"], "torch/none.so")]
    assert [fails(errno.ENOENT, path) for path in ours] == [None, None]
    for other in (ValueError("x"), OSError("no errno"), fails(errno.EBADF, 3), OSError(errno.ECONNREFUSED, "refused")):
        assert other is None or describe_system_error(other) is None

    assert run_program(lambda: int(open(tmp_path).read()), name="tool") == 2  # noqa: SIM115
    assert capsys.readouterr().err == f"tool: error: {str(tmp_path)!r} cannot be used: is a directory; name a file\n"
    with pytest.raises(FileNotFoundError):  # a fault of ours keeps its traceback
        run_program(lambda: int(open(PACKAGE / "none").read()), name="tool")  # noqa: SIM115


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", CHECKPOINT], ["chat", "-m", CHECKPOINT, "--max-new-tokens", "2", "hi"]]
)
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llava", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=HERE, env=environment(),
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_written_names_its_target(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "incomplete-new"))

    with pytest.raises(OSError, match="Read-only") as caught, atomic_folder(tmp_path / "new"):
        fails()
    assert caught.value.filename == str(tmp_path / "new")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    for folder, variable in ((cache_folder, "XDG_CACHE_HOME"), (state_folder, "XDG_STATE_HOME")):
        with pytest.raises(InputError, match=f"no home folder; set the variable HOME or {variable}"):
            folder()
    from llava.engine.kernels.cpu.build import _compiled

    assert _compiled.__wrapped__() is None  # the engine works without
    from llava.cli.terminal import _line_history

    with _line_history():  # and a conversation without a history
        pass


# Packages

EXTRAS = [
    "accelerate", "peft", "tensorboard", "pyarrow", "wandb", "trackio", "fastapi", "starlette", "uvicorn", "httpx",
    "prometheus_client", "gradio", "gradio_client", "bitsandbytes", "openpyxl", "gguf", "llguidance", "deepspeed",
]  # fmt: skip
NEEDED = [
    (["train", *TRAIN, "--output_dir", "{out}/run"], "'.[train]'"),
    (["trace", "--data", str(LOGOS / "train.json"), "--image-folder", str(LOGOS / "images")], "'.[train]'"),
    (["data", "check", "{out}/a.parquet"], "'.[train]'"),
    (["serve", CHECKPOINT, "--port", "0"], "'.[serve]'"),
    (["controller", "--port", "0"], "'.[serve]'"),
    (["worker", "--model-path", CHECKPOINT, "--port", "0"], "'.[serve]'"),
    (["web", "--port", "0"], "'.[ui]'"),
    (["chat", "-m", CHECKPOINT, "--load-4bit", "hi"], "'.[quant]'"),
    (["convert", CHECKPOINT, "{out}/a.gguf", "--to", "gguf"], "'.[gguf]'"),
]


def test_packages_that_are_absent_name_their_extra(tmp_path: Path) -> None:
    """In a process whose installed packages are those of a plain installation."""
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if path.name.split("-")[0].lower() not in EXTRAS and path.suffix != ".pth":
            (installed / path.name).symlink_to(path)
    (tmp_path / "a.parquet").touch()
    calls = [[word.format(out=tmp_path) for word in arguments] for arguments, _ in NEEDED]
    calls.append(["selftest", CHECKPOINT, "--steps", "1"])
    code = (
        "import json, sys\nfrom llava.__main__ import main\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    print('-----', file=sys.stderr, flush=True)\n"
        "    try:\n        print('status', main(call), file=sys.stderr)\n"
        "    except SystemExit as ended:\n        print('status', ended.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, json.dumps(calls)],
        capture_output=True, text=True, cwd=HERE, timeout=300,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)])},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    *refused, selftest = done.stderr.split("-----\n")[1:]
    for (arguments, extra), said in zip(NEEDED, refused, strict=True):
        assert f"pip install -e {extra}" in said, said
        assert said.endswith("status 2\n"), said
        assert f"llava {arguments[0]}" in said
    assert selftest.endswith("status 0\n"), selftest
    assert "pip install -e '.[train]'" in done.stdout  # the reason why one item is skipped
    assert "4 of 5 items hold (4 skipped)" in done.stdout
