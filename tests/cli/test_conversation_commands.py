"""What a typed conversation of `llava chat` offers: commands, settings, Tab, several lines, history, images in the terminal."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import CHECKPOINT, IMAGE, environment
from golden_data import HERE
from PIL import Image

from llava.cli.chat_commands import COMMANDS, SETTINGS
from llava.cli.inline_images import as_escape, find_protocol
from llava.cli.line_completion import LineCompleter

COMPLETER = LineCompleter([*COMMANDS], {"/set": [*SETTINGS]})
needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")


# Tab


def test_commands_and_settings_are_completed() -> None:
    assert COMPLETER.candidates("/s") == ["/system ", "/set ", "/save "]
    assert COMPLETER.candidates("/set te") == ["temperature "]
    assert COMPLETER.candidates("/set ") == [f"{name} " for name in SETTINGS]
    assert COMPLETER.candidates("What is in /he") == []
    assert COMPLETER.candidates("") == []


def test_paths_are_completed_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("red star.png", "red.jpg", "it's (1).png", ".hidden.png", "größe.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed, found in {
        "re": ["red\\ star.png ", "red.jpg "],
        "What is red\\ ": ["red\\ star.png "],
        "it": ["it\\'s\\ \\(1\\).png "],
        "./fo": ["./folder/"],
        "folder/": ["folder/inside.png "],
        "~/fold": ["~/folder/"],
        f"{tmp_path}/gr": [f"{tmp_path}/größe.png "],
        ".h": [".hidden.png "],
        "/image red.": ["red.jpg "],
        "nothing/": [],
    }.items():
        assert COMPLETER.candidates(typed) == found


def test_a_completed_path_is_the_image_that_is_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.cli.image_words import read_line

    for name in ("a b.png", "it's (1).png", "c#d&e.png", "wei\\rd.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in os.listdir(tmp_path):
        (completed,) = (
            word
            for word in COMPLETER.candidates("./")
            if word.replace("\\", "").strip() == "./" + name.replace("\\", "")
        )
        read = read_line(completed + "What is it?")
        assert [Path(str(source)).name for source in read.sources] == [name]
        assert read.question == "What is it?"


# Images in the terminal


@pytest.fixture
def original() -> Image.Image:
    image = Image.new("RGB", (1000, 300), (250, 250, 250))
    image.paste((200, 30, 30), (0, 0, 500, 150))
    image.paste((30, 60, 200), (500, 150, 1000, 300))
    return image


def test_kitty_and_iterm_get_the_image_smaller(original: Image.Image) -> None:
    kitty = as_escape(original, "kitty")
    chunks = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", kitty)
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in chunks) == kitty
    assert [keys.rpartition("m=")[2] for keys, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, data in chunks)
    found = re.fullmatch(r"\033\]1337;File=([^:]*):([^\a]*)\a", as_escape(original, "iterm"))
    assert found is not None
    for data in ("".join(data for _, data in chunks), found[2]):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (480, 144)
        assert image.getpixel((10, 10)) == (200, 30, 30)


def decoded_sixels(text: str) -> Image.Image:
    """A decoder of sixels by their definition: columns of six points, in colours given in percent."""
    body = re.fullmatch(r'\033Pq"1;1;(\d+);(\d+)(.*)\033\\', text, re.DOTALL)
    assert body is not None
    image = Image.new("RGB", (int(body[1]), int(body[2])))
    colours: dict[int, tuple[int, int, int]] = {}
    x = y = colour = 0
    for token in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|([$-])|(.)", body[3]):
        if token[1]:
            red, green, blue = (round(int(value) * 255 / 100) for value in (token[2], token[3], token[4]))
            colours[int(token[1])] = (red, green, blue)
        elif token[5]:
            colour = int(token[5])
        elif token[8]:
            x, y = 0, y + 6 * (token[8] == "-")
        else:
            bits, columns = ord(token[7] or token[9]) - 63, int(token[6] or 1)
            for column, bit in itertools.product(range(x, x + columns), range(6)):
                if bits >> bit & 1:
                    image.putpixel((column, y + bit), colours[colour])
            x += columns
    return image


def test_sixels_are_the_image(original: Image.Image) -> None:
    shown = decoded_sixels(as_escape(original, "sixel"))
    small = original.copy()
    small.thumbnail((480, 240))
    assert shown.size == small.size
    differences = [
        abs(a - b)
        for x in range(0, shown.width, 7)
        for y in range(shown.height)
        for a, b in zip(shown.getpixel((x, y)), small.getpixel((x, y)), strict=True)  # type: ignore[arg-type]
    ]
    assert max(differences) < 30


def test_which_terminals_show_images() -> None:
    for variables, protocol in (
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x"}, None),
        ({}, None),
    ):
        assert find_protocol(variables) == protocol


# At a terminal


class Screen:
    """`llava chat` at a pseudo-terminal."""

    def __init__(self, state: Path, *flags: str, **variables: str) -> None:
        import pty

        self._keys, theirs = pty.openpty()
        own = {"XDG_STATE_HOME": str(state), "TERM": "xterm-256color", "NO_COLOR": "1", "HOME": str(state)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava", "chat", "-m", CHECKPOINT, "--max-new-tokens", "4", *flags, IMAGE],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=HERE,
            env=environment() | own | variables,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, mark: str, seconds: float = 120.0) -> str:
        """What has come until `mark`, which counts as read."""
        deadline = time.monotonic() + seconds
        while mark not in self.text:
            assert time.monotonic() < deadline, f"no {mark!r} in {self.text!r}"
            if select.select([self._keys], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self._keys, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"ended before {mark!r}: {self.text!r}") from error
        before, _, self.text = self.text.partition(mark)
        return before

    def type(self, keys: str, mark: str = "> ") -> str:
        os.write(self._keys, keys.encode())
        if keys[-1] in "\r\n":
            self.wait_for("\n")  # its echo
        return self.wait_for(mark)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._keys)


@pytest.fixture
def screens(tmp_path: Path) -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


@needs_pty
def test_a_conversation_with_commands(tmp_path: Path, screens: list[Screen]) -> None:
    (tmp_path / "kept").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "my star.png")
    screens.append(screen := Screen(tmp_path, TERM="xterm-kitty"))
    screen.wait_for("1 image;")
    assert "\033_Gf=100" in screen.wait_for("> ")  # the image of the command line, in a terminal that shows it
    assert "temperature 0.5" in screen.type("/set tempe\t0.5\n")
    assert "seed 7" in screen.type("/set seed=7\n")
    assert "it is 'x'" in screen.type("/set top_k x\n").replace("top_k is 'x'", "it is 'x'")
    assert "did you mean 'top_p'" in screen.type("/set topp 1\n")
    assert "top_k is -3" in screen.type("/set top_k -3\n")
    assert "system text: Be brief." in screen.type("/sys\tBe brief.\n")
    first = screen.type("What is it?\n")
    screen.type("/undo\n")
    assert screen.type("What is it?\n") == first  # the seed
    assert "attached" in screen.type("~/my\t What is it?\n")
    screen.type("/save ~/kept/talk.json\n")
    screen.type("/clear\n")
    assert "2 questions" in screen.type("/load ~/kept/talk.json\n")
    screen.type('"""/set the table\n', "... ")
    screen.type('and say "why"?"""\n')
    screen.type("/save ~/kept/more.json\n")
    assert "did you mean '/clear'" in screen.type("/claer\n")
    os.write(screen._keys, b"quit\n")
    assert screen.process.wait(60) == 0
    saved = json.loads((tmp_path / "kept/more.json").read_text())
    assert saved["exchanges"][-1]["question"] == '/set the table\nand say "why"?'
    assert saved["system"] == "Be brief."
    screens.append(again := Screen(tmp_path, TERM="dumb"))
    assert "\033_G" not in again.wait_for("> ")
    assert "temperature 0.5" in again.type("\x12tempe\r")  # Ctrl-R finds what was typed in the session before
    os.write(again._keys, b"exit\n")
    assert again.process.wait(60) == 0


@pytest.mark.slow
@needs_pty
def test_a_terminal_is_asked_for_sixels(tmp_path: Path, screens: list[Screen]) -> None:
    screens.append(screen := Screen(tmp_path))
    screen.wait_for("\033[c")
    os.write(screen._keys, b"\033[?62;4;22c")
    assert '\033Pq"1;1;' in screen.wait_for("> ")
    assert "unknown" not in screen.type("/set seed\n")  # the reply was not read as typed keys
    screens.append(other := Screen(tmp_path, "--show-images", "off"))
    assert "\033" not in re.sub(r"\033\[\?2004[hl]", "", other.wait_for("> "))


def test_words_in_a_pipe_are_questions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llava", "chat", "-m", CHECKPOINT, "--max-new-tokens", "2"],
        input="exit\n/set seed 3\n/quit\nnever\n",
        capture_output=True,
        text=True,
        cwd=HERE,
        env=environment(),
        timeout=120,
    )
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert "seed 3" in done.stderr
