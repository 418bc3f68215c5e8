"""What a user can get wrong: one sentence on stderr that names it, exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cli_kit import CHECKPOINT, IMAGE, run_llava, run_python
from golden_data import HERE

from llava.__main__ import main
from llava.cli.commands import COMMANDS
from llava.cli.program import ArgumentParser, run_program
from llava.errors import InputError, MissingPackageError, require

CHAT = ["chat", "-m", CHECKPOINT]
CLI = ["cli", "--model-path", CHECKPOINT, "--device", "cpu", "--image-file"]


def name_of(arguments: Sequence[str]) -> str:
    return f"llava {arguments[0]}" if arguments[0] in COMMANDS else "llava"


@pytest.fixture(autouse=True)
def in_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def refused(*arguments: str) -> str:
    """Run a program that must refuse, in this process, where torch is imported already; gives its sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    assert out.getvalue() == ""
    return the_sentence(arguments, status, err.getvalue())


def refused_by_program(*arguments: str, stdin: str = "") -> str:
    """The same in a process of its own, as a user runs it."""
    done = run_llava(*arguments, stdin=stdin)
    return the_sentence(arguments, done.returncode, done.stderr)


def the_sentence(arguments: Sequence[str], status: object, printed: str) -> str:
    assert status == 2, printed
    assert "Traceback" not in printed
    lines = printed.splitlines()
    assert len(lines) == 1, printed
    assert lines[0].startswith(f"{name_of(arguments)}: error: ")
    return lines[0]


def test_no_such_model_folder() -> None:
    for arguments in (["chat", "-m", "no/such/model", "hi"], ["cli", "--model-path", "./no", *CLI[3:], IMAGE]):
        assert "no" in refused_by_program(*arguments)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    shutil.copy(HERE / CHECKPOINT / "config.json", tmp_path)
    said = refused("chat", "-m", str(tmp_path), IMAGE, "hi")
    assert str(tmp_path) in said
    assert "weights" in said
    (tmp_path / "config.json").unlink()
    assert "config.json" in refused("chat", "-m", str(tmp_path), IMAGE, "hi")


def test_a_broken_image(tmp_path: Path) -> None:
    whole = (HERE / "images/noise_40x90.png").read_bytes()
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole[: len(whole) // 2])
    for start in (CHAT, CLI):
        said = refused(*start, str(broken), *(["hi"] if start is CHAT else []))
        assert "broken.png" in said


def test_a_text_file_as_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("These are words.\n")
    for start in (CHAT, CLI):
        assert "notes.txt" in refused(*start, str(tmp_path / "notes.txt"), *(["hi"] if start is CHAT else []))


def test_an_image_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = io.BytesIO()
    bomb.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)))
    bomb.write(chunk(b"IDAT", zlib.compress(bytes(60000 * 7501), 9)) + chunk(b"IEND", b""))
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    assert len(bomb.getvalue()) < 1_000_000
    said = refused(*CHAT, str(tmp_path / "bomb.png"), "hi")
    assert "bomb.png" in said
    assert "pixels" in said


def test_no_such_image() -> None:
    assert "photo.jpg" in refused(*CHAT, "photo.jpg", "hi")
    assert "photo.jpg" in refused(*CLI, "photo.jpg")


def test_an_image_that_is_none_is_never_left_out(tmp_path: Path) -> None:
    """Wherever it stands, and whatever it was meant to be."""
    for command in ("chat", "trace"):
        for missing in ("x.HEIC", "photo.xyz", "no/such", "~/no.png", "file:///no/such.png", str(tmp_path)):
            for words in ([missing, "What is it?"], ["What is it?", missing], [IMAGE, "What is it?", missing]):
                said = refused(command, "-m", CHECKPOINT, *words)
                assert "such" in said or "no image" in said or "folder" in said, words
        assert "no image file 'foto.jpg'" in refused(command, "-m", CHECKPOINT, "What is in foto.jpg?")
    for stdin in ("", "\0\1"):
        assert "stdin" in refused_by_program(*CHAT, IMAGE, "/dev/stdin", stdin=stdin)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        for connection in held:
            connection.close()


def test_a_url_inside_the_own_network(silent_server: str) -> None:
    for url in (silent_server, "http://localhost/a.png", "http://169.254.169.254/latest", "http://[::1]/a.png"):
        assert url.split("/")[2].split(":")[0].strip("[") in refused(*CHAT, url, "hi")
    refused(*CLI, silent_server)


def test_a_url_that_times_out(silent_server: str) -> None:
    said = refused(*CHAT, "--allow-private-hosts", "--image-timeout", "0.5", silent_server, "hi")
    assert silent_server in said
    assert "0.5" in said


def test_a_prompt_too_long_for_the_context() -> None:
    said = refused(*CHAT, IMAGE, "word " * 3000)
    assert "16 image tokens" in said
    assert "2048" in said
    done = run_llava(*CLI, IMAGE, stdin="word " * 3000 + "\n")
    assert done.returncode == 2
    assert "16 image tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_placeholders_than_images_and_fewer() -> None:
    said = refused(*CHAT, IMAGE, "<image> and <image>")
    assert "2 <image> placeholders for 1 image" in said
    assert "1 <image> placeholder for 0 images" in refused(*CHAT, "what is <image>")
    assert "1 <image> placeholder for 2 images" in refused(*CHAT, IMAGE, IMAGE, "what is <image>")
    done = run_llava(*CLI, IMAGE, stdin="<image> and <image>\n")
    assert done.returncode == 2
    assert "2 <image> placeholders for 1 image" in done.stderr


def test_an_unknown_conversation_mode() -> None:
    for start in ([*CHAT, IMAGE, "hi"], [*CLI, IMAGE]):
        said = refused(*start, "--conv-mode", "vicuna_v2")
        assert "vicuna_v2" in said
        assert "vicuna_v1" in said
        assert "mistral_instruct" in said


def test_an_unknown_flag() -> None:
    for start in (["chat", "hi"], ["cli"]):
        said = refused(*start, "--temprature", "1")
        assert "'--temprature'" in said
        assert "'--temperature'" in said
    assert "'chat'" in refused_by_program("caht")


def test_other_things_that_cannot_work(tmp_path: Path) -> None:
    refusals = [
        ([*CHAT, "--model_path", "x", "hi"], "'--model-path'"),
        ([*CHAT, "--max-tokens=5", "hi"], "'--max-new-tokens'"),
        ([*CLI, IMAGE, "--conv_mode", "v1"], "'--conv-mode'"),
        ([*CLI, IMAGE, "extra"], "'extra'"),
        ([*CHAT, "--top-p", "0.5", "hi"], "--temperature"),
        ([*CHAT, "--temperature", "-1", "hi"], "-1.0"),
        ([*CHAT, "--temperature", "warm", "hi"], "'warm'"),
        ([*CHAT, "--num-beams", "0", "hi"], "beams"),
        ([*CHAT, "--image-timeout", "0", "hi"], "timeout"),
        ([*CHAT, "--load-4bit", "--load-8bit", "hi"], "--load-4bit"),
        ([*CHAT, "--device", "tpu9", "hi"], "'tpu9'"),
        ([*CHAT, "--dtype", "int3", "hi"], "'int3'"),
        ([*CHAT, str(tmp_path / "photo.jpg"), "hi"], "photo.jpg"),
        (["chat", "-m", "checkpoints/vicuna-tiny-base", IMAGE, "hi"], "vision tower"),
        (
            ["cli", "--model-path", "checkpoints/vicuna-tiny-base", "--device", "cpu", "--image-file", IMAGE],
            "vision tower",
        ),
        (["chat", "-m", f"{CHECKPOINT}/config.json", "hi"], "is a file"),
        (["--hlep"], "'--hlep'"),
    ]
    for arguments, named in refusals:
        assert named in refused(*arguments), arguments
    assert "stdin" in refused_by_program(*CHAT, "-")


# The wrapper itself


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        raise error

    assert run_program(lambda: None, name="tool") == 0
    assert run_program(lambda: 3, name="tool") == 3
    assert run_program(raising, InputError("one\nsentence"), name="tool") == 2
    assert capsys.readouterr().err == "tool: error: one sentence\n"
    assert run_program(raising, KeyboardInterrupt(), name="tool") == 130
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        run_program(lambda: 1 // 0, name="tool")


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[dev\]'"):
        require("no_such_package.inside", extra="dev")


def test_the_parser_takes_words_and_flags_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="p")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--number", type=float)
    assert parser.parse_args(["a", "--number", "-1", "b"]) == parser.parse_args(["--number=-1", "a", "b"])
    assert parser.parse_args(["--num", "2", "--", "--not-a-flag"]).words == ["--not-a-flag"]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["-x"])
    assert ended.value.code == 2
    assert "'-x'" in capsys.readouterr().err


def test_an_interrupt_while_starting_is_quiet() -> None:
    code = (
        "import sys\nfrom llava.cli import chat\n"
        f"def stop(args): raise KeyboardInterrupt\nchat.load_model = stop\nsys.exit(chat.main(['-m', {CHECKPOINT!r}, 'hi']))"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_no_message_of_a_library_stands_between_the_words_of_an_answer() -> None:
    pytest.importorskip("bitsandbytes")
    done = run_llava(*CHAT, "--load-8bit", "--device", "cpu", "--max-new-tokens", "4", IMAGE, "What is it?")
    assert (done.returncode, done.stderr) == (0, "")
    assert "MatMul8bitLt" not in done.stdout
