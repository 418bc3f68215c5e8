"""Long waits are shown: downloads from a hub that answers on loopback, interrupted, resumed and refused; bars and lines."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import environment
from hub_kit import FakeHub, fake_hub
from tiny import build

from llava.cli.waits import WaitDisplay, duration_text, shown_waits, size_text
from llava.errors import InputError
from llava.model.checkpoints import hub_download
from llava.utils import Wait, is_watched, waiting


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights take a while at a slow hub's rate."""
    return build(tmp_path_factory.mktemp("hub") / "llava-tiny", vocab_size=4000)


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    with fake_hub({"someone/llava-tiny": checkpoint}) as server:
        yield server


def environment_for(hub: FakeHub | None, home: Path) -> dict[str, str]:
    values = environment() | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_OFFLINE", "LLAVA_PROGRESS"):
        values.pop(name, None)
    return values | {"HF_ENDPOINT": hub.url if hub is not None else "http://127.0.0.1:9"}


FETCH = (
    "import sys\nfrom llava.cli.program import run_program\n"
    "from llava.model.checkpoints.hub import HubOptions, resolve_checkpoint\n"
    "options = HubOptions(revision=sys.argv[2] if len(sys.argv) > 2 else None)\n"
    "sys.exit(run_program(lambda: print(resolve_checkpoint(sys.argv[1], hub=options)), name='fetch'))"
)


def fetch(hub: FakeHub | None, home: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FETCH, *words]
    env = environment_for(hub, home) | extra
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


# Downloads


@pytest.mark.slow
def test_a_slow_download_is_a_line_now_and_then_in_a_log(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    size = (checkpoint / "model.safetensors").stat().st_size
    hub.bytes_per_s = size / 4
    done = fetch(hub, tmp_path, "someone/llava-tiny")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("downloading")]
    assert len(lines) == 2  # after two seconds, and at the end
    amounts = r"downloading someone/llava-tiny [\d.]+ [MkG]B of [\d.]+ MB, [\d.]+ [kM]B/s, \d+ s left"
    assert re.fullmatch(amounts, lines[0]), lines[0]
    assert re.fullmatch(r"downloading someone/llava-tiny: \d+ s, [\d.]+ MB", lines[1]), lines[1]
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    # What is there is not fetched again, and a quick look shows nothing.
    sent = hub.sent
    again = fetch(hub, tmp_path, "someone/llava-tiny")
    assert (again.stdout, again.stderr, hub.sent) == (done.stdout, "", sent)
    # Nor is the network needed.
    offline = fetch(None, tmp_path, "someone/llava-tiny")
    assert offline.stdout == done.stdout, offline.stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_download_at_once_and_the_next_goes_on(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    size = (checkpoint / "model.safetensors").stat().st_size
    hub.bytes_per_s = size / 40
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, "someone/llava-tiny"],
        env=environment_for(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    weights = list[Path]()
    while not weights or weights[0].stat().st_size < size / 12:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
        weights = sorted(tmp_path.rglob("*.incomplete"), key=lambda file: -file.stat().st_size)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)  # of 40 seconds that the rest would take
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    hub.bytes_per_s = None
    hub.requests.clear()
    done = fetch(hub, tmp_path, "someone/llava-tiny")
    assert done.returncode == 0, done.stderr
    fetched = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"model.safetensors"}  # the other files were whole
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors"
    ).read_bytes()


def test_a_download_is_a_bar_on_a_terminal(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.bytes_per_s = (checkpoint / "model.safetensors").stat().st_size / 4
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, "someone/llava-tiny"],
        env=environment_for(hub, tmp_path), stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=30) == 0
    frames = shown.decode().split("\r\x1b[K")
    assert len(frames) > 4
    assert re.match(r"downloading someone/llava-tiny \[#+\.+\] .* MB, .*/s, \d+ s left", frames[-2]), frames[-2]
    assert re.match(r"downloading someone/llava-tiny: \d+ s, ", frames[-1]), frames[-1]


REFUSALS = {
    "no such repository": (
        None,
        ("nobody/nothing",),
        "was not found; .*the hub repository nobody/nothing; check the name",
    ),
    "no such revision": (None, ("someone/llava-tiny", "v9"), "which has no revision 'v9'; look at http://127"),
    "unknown user": ((401, {}), ("someone/private",), r"refuses this user \(status 401\).*hf auth login.*HF_TOKEN"),
    "forbidden": ((403, {}), ("someone/private",), r"refuses this user \(status 403\)"),
    "terms not accepted": (
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
        ("someone/private",),
        "accept them on http://127.0.0.1:.*/someone/private, then log in with `hf auth login`",
    ),
    "a broken hub": ((500, {}), ("someone/private",), "did not give .*500.*set HF_ENDPOINT to a mirror"),
}


def test_refusals_are_one_sentence_each(hub: FakeHub, tmp_path: Path) -> None:
    """In one process, since it takes long to start; the hub's answers are set between the calls."""
    code = (
        "import json, sys, urllib.request\n"
        "from llava.errors import InputError\n"
        "from llava.model.checkpoints.hub import HubOptions, resolve_checkpoint\n"
        "for line in sys.stdin:\n"
        "    words = json.loads(line)\n"
        "    try:\n"
        "        resolve_checkpoint(words[0], hub=HubOptions(revision=words[1] if len(words) > 1 else None))\n"
        "    except InputError as error:\n"
        "        print(json.dumps(str(error)), flush=True)\n"
    )
    import json

    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment_for(hub, tmp_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for case, (status, words, sentence) in REFUSALS.items():
            hub.status = {"someone/private": status} if status else {}
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            text = json.loads(process.stdout.readline())
            assert re.search(sentence, text), (case, text)
            assert len(text.splitlines()) == 1


def test_no_network(tmp_path: Path) -> None:
    done = fetch(None, tmp_path, "someone/llava-tiny")
    assert done.returncode == 2
    assert re.search(r"fetch: error: .*which http://127.0.0.1:9 did not give .*check the connection", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1
    done = fetch(None, tmp_path, "someone/llava-tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*words: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        InputError, match="the disk became full while 'a/b' was downloaded; make room, or set the variable HF_HOME"
    ):
        hub_download.download_repository("a/b", what="model", tried=[], options={})


# The display


class Log(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


def test_what_is_shown_of_a_wait() -> None:
    display = WaitDisplay(Log(terminal=True))
    wait = Wait("loading weights", 4 * 10**9, in_bytes=True, started=100.0)
    for second in range(11):
        wait.done = second * 10**8
        display._show(wait, 100.0 + second)
    assert display.text(wait, 110.0) == "loading weights [######..................] 1 GB of 4 GB, 100 MB/s, 30 s left"
    display = WaitDisplay(Log(terminal=False))
    display._samples.append((0.0, 0))
    assert display.text(Wait("compiling", started=5.0), 65.0) == "compiling ... 1:00"
    assert display.text(Wait("recording", 8, done=2, started=5.0), 65.0) == "recording 2 of 8"


def test_a_short_wait_shows_nothing_and_a_log_gets_few_lines() -> None:
    log = Log(terminal=False)
    display = WaitDisplay(log)
    wait = Wait("downloading x", started=0.0)
    for tenth in range(600):  # a minute
        display._show(wait, tenth / 10)
    assert log.getvalue().count("\n") == 6
    assert log.getvalue().startswith("downloading x ... 2 s\n")
    quick = Log(terminal=True)
    display = WaitDisplay(quick)
    display._show(Wait("x", started=0.0), 1.9)
    assert quick.getvalue() == ""


def test_waits_within_waits() -> None:
    log = Log(terminal=False)
    display = WaitDisplay(log, patience_s=0.0)
    outer, inner = Wait("outer"), Wait("inner")
    display.begin(outer)
    display.begin(inner)
    while "inner" not in log.getvalue():
        time.sleep(0.01)
    display.end(inner)
    while "outer" not in log.getvalue():
        time.sleep(0.01)
    display.end(outer)
    assert [line.split()[0] for line in log.getvalue().splitlines()] == ["inner", "outer"]
    assert display._ended(Wait("x"), 11.0) == "x: 11 s\n"
    assert display._ended(Wait("x", in_bytes=True, done=2000), 3.0) == "x: 3 s, 2 kB\n"
    assert display._thread is None


def test_a_library_shows_nothing() -> None:
    assert not is_watched()
    with waiting("something", 3) as wait:
        wait.done = 3
    with shown_waits():
        assert is_watched()
    assert not is_watched()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (14_130_000_000, "14.1 GB"), (1_234_000_000_000, "1234 GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
