"""`llava chat`: streaming, stopping, one question, conversations typed and piped, and what a session remembers."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import CHECKPOINT, IMAGE, environment, run_llava, run_python, start_llava
from golden_data import HERE, golden
from PIL import Image

from llava.cli.chat import build_parser
from llava.conversation import get_template
from llava.engine.config import EngineError
from llava.engine.hf_engine import HFEngine
from llava.engine.request import PromptSize, Request, SamplingParams
from llava.errors import InputError
from llava.images.download import DEFAULT_LIMITS
from llava.session import LoadedImage, Session
from llava.text.detokenizer import IncrementalDetokenizer, overlap, stream_decoder
from llava.text.tokenization import load_tokenizer

SHORT = ["-m", CHECKPOINT, "--max-new-tokens", "8"]
ANSWER = "yp\ufffd phri NMUuct"  # recorded: greedy, 8 tokens, to "What is it?" about IMAGE
TOKENIZERS = ["llama-mini1k-legacy", "llama-mini1k-nonlegacy", "neox2k-plain", "neox2k-chatml"]


# Text from tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_text_is_the_decoded_text(name: str) -> None:
    """Any tokens, also half characters: pieces joined are the whole, and no piece ends in a half character."""
    tokenizer = load_tokenizer(golden(f"tokenizers/{name}"))
    chosen = random.Random(0)
    written = [tokenizer(text).input_ids for text in ("Größe: 漢字 ✓ 🦙🦙", "a  b\n\n\tc ", "naïve — 中文")]
    noise = [[chosen.randrange(3, len(tokenizer)) for _ in range(chosen.randrange(1, 40))] for _ in range(200)]
    for ids in written + noise:
        decoder = stream_decoder(tokenizer)
        pieces = [decoder.push([token]) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        whole = "".join([*pieces, decoder.finish()])
        assert whole == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class SpelledOut:
    """A tokenizer whose tokens are pieces of text in a list."""

    eos_token_id, unk_token_id, all_special_ids = 0, 1, (0, 1, 2)

    def __init__(self, pieces: list[str], special: str = "<special>") -> None:
        self.pieces = ["", "", "", *pieces]
        self.special = special

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(self.pieces[token] for token in ids)

    def convert_tokens_to_ids(self, text: str) -> int:
        return 2 if text == self.special else 1


def read(pieces: list[str], stop: list[str]) -> tuple[list[str], IncrementalDetokenizer]:
    reader = IncrementalDetokenizer(SpelledOut(pieces), stop)
    shown = []
    for token in range(3, 3 + len(pieces)):
        shown.append(reader.read([token]))
        if reader.stopped:
            break
    return [*shown, reader.finish()], reader


def test_stop_strings_never_show_however_they_are_cut() -> None:
    chosen = random.Random(1)
    for _ in range(2000):
        text = "".join(chosen.choice("#ab \n") for _ in range(chosen.randrange(12)))
        cuts = sorted(chosen.sample(range(len(text) + 1), chosen.randrange(len(text) + 1)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stop = ["###", "ab#", "\n\n"][: chosen.randrange(4)]
        shown, reader = read(pieces, stop)
        places = [place for word in stop if (place := text.find(word)) >= 0]  # blank space before the answer counts
        expected = text[: min(places, default=None)].strip()
        assert "".join(shown) == reader.text == expected, (pieces, stop)
        assert reader.stopped == bool(places)


def test_text_shows_as_soon_as_it_is_certain() -> None:
    shown, _ = read(["Hel", "lo", " wor", "ld #", "#", " x", "##", "#!"], ["###"])
    assert shown == ["Hel", "lo", " wor", "ld", "", " ## x", "", "", ""]
    assert overlap("ab#", "###") == 1
    assert overlap("ab###", "###") == 2
    assert overlap("ab", "###") == 0


def test_a_stop_string_that_is_one_special_token_ends_by_its_id() -> None:
    reader = IncrementalDetokenizer(SpelledOut(["a", "b"], special="<|end|>"), ["<|end|>"])
    assert (reader.read([3]), reader.stopped) == ("a", False)
    assert (reader.read([2]), reader.stopped) == ("", True)


# One answer


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    from llava.model.builder import load

    before = Path.cwd()
    os.chdir(HERE)
    yield load(CHECKPOINT, device="cpu")
    os.chdir(before)


@pytest.fixture(scope="module")
def engine(loaded: Any) -> Iterator[HFEngine]:
    with HFEngine.from_loaded(loaded) as engine:
        yield engine


PROMPT = "A chat. USER: <image>\nWhat is it? ASSISTANT:"


def request(**sampling: Any) -> Request:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    return Request(PROMPT, [Image.fromarray(pixels)], SamplingParams(**{"max_new_tokens": 40} | sampling))


def generated(loaded: Any, **arguments: Any) -> list[int]:
    """What `model.generate` gives for the same prompt."""
    asked = request()
    inputs = loaded.processor(asked.prompt, asked.images)
    output = loaded.model.generate(
        inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, max_new_tokens=40, **arguments
    )
    return output[0].tolist()


def test_a_stream_is_what_generate_gives(loaded: Any, engine: HFEngine) -> None:
    expected = generated(loaded, do_sample=False)
    for num_beams in (1, 3):
        handle = engine.stream(request(num_beams=num_beams))
        chunks = list(handle)
        assert list(handle) == []  # the end stays the end
        result = handle.result()
        completion = result.completions[0]
        assert "".join(chunk.text for chunk in chunks) == completion.text == result.text
        assert [token for chunk in chunks for token in chunk.token_ids] == list(completion.token_ids)
        if num_beams == 1:
            assert list(completion.token_ids) == expected
            assert completion.text == loaded.tokenizer.decode(expected, skip_special_tokens=True).strip()
            assert len(chunks) > 20
        else:
            assert list(completion.token_ids) == generated(loaded, do_sample=False, num_beams=3)
        assert completion.finish_reason == "length"
        assert 0 < result.timings.first_token_s <= result.timings.total_s
        assert result.usage.num_image_tokens == 16


def test_cancelling_stops_within_a_token(engine: HFEngine) -> None:
    waiting = engine.submit(request(max_new_tokens=1500))
    with engine.stream(request(max_new_tokens=1500)) as behind:
        behind.abort()
        with waiting:
            first = next(chunk.text for chunk in waiting if chunk.text)
            waiting.abort()
            rest = [chunk.text for chunk in waiting]
    completion = waiting.result().completions[0]
    assert completion.finish_reason == "cancelled"
    assert completion.text.startswith(first)
    assert completion.text.endswith("".join(rest))
    assert 0 < len(completion.token_ids) < 1500
    assert behind.result().completions[0].token_ids == ()


def test_a_stop_string_ends_the_generation(engine: HFEngine) -> None:
    whole = engine.generate(request()).text
    stop = whole[10:14]
    completion = engine.generate(request(stop=(stop,))).completions[0]
    assert completion.text == whole[: whole.index(stop)].strip()
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < 40


def test_a_fault_in_the_thread_is_raised_where_one_waits(
    engine: HFEngine, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model, "forward", breaks)
        handle = engine.stream(request())
        with pytest.raises(EngineError, match="ValueError: no such thing"):
            list(handle)
    assert engine.generate(request(max_new_tokens=2)).completions[0].finish_reason == "length"
    assert engine.alive


def test_prompts_are_measured_as_the_model_sees_them(loaded: Any, engine: HFEngine) -> None:
    asked = request(max_new_tokens=1)
    inputs = loaded.processor(asked.prompt, asked.images)
    embeds = loaded.model.prepare_inputs_labels_for_multimodal(
        inputs.input_ids[None], None, None, None, None, inputs.images, inputs.image_sizes
    )[4]
    size = engine.submit(asked).size
    assert size.total == embeds.shape[1]
    assert size.num_image_tokens == 16
    assert PromptSize(90, 10).room(128, 512) == 28
    assert PromptSize(90, 10).room(128, 5) == 5
    with pytest.raises(InputError, match=r"100 text tokens and 28 image tokens make 128.*holds 128"):
        PromptSize(100, 28).room(128, 5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"num_beams": 0}, {"max_new_tokens": 0}], ids=str
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingParams(**wrong)


# A session


@pytest.fixture
def session(loaded: Any) -> Session:
    return Session(loaded, get_template("llava_v1"), SamplingParams(max_new_tokens=6))


def ask(session: Session, question: str) -> tuple[str, str]:
    prompt = session.conversation(question).get_prompt()
    with session.ask(question) as handle:
        text = "".join(chunk.text for chunk in handle)
    assert text == handle.result().text
    session.record(question, text)
    return prompt, text


def test_a_session_remembers_questions_images_and_answers(session: Session, tmp_path: Path) -> None:
    session.attach([LoadedImage.open(IMAGE, DEFAULT_LIMITS)])
    prompt, first = ask(session, "What is it?")
    assert prompt.endswith("USER: <image>\nWhat is it? ASSISTANT:")
    session.attach(
        [LoadedImage.open(IMAGE, DEFAULT_LIMITS), LoadedImage.open("images/noise_40x90.png", DEFAULT_LIMITS)]
    )
    prompt, second = ask(session, "And <image> or <image>?")
    assert prompt.endswith(f"USER: <image>\nWhat is it? ASSISTANT: {first}</s>USER: And <image> or <image>? ASSISTANT:")

    saved = tmp_path / "talk.json"
    session.save(str(saved))
    copy = Session(session._loaded, get_template("llava_v1"), SamplingParams(max_new_tokens=6))
    copy.load(str(saved), DEFAULT_LIMITS)
    assert copy.conversation("More?").get_prompt() == session.conversation("More?").get_prompt()
    assert ask(copy, "More?") == ask(session, "More?")

    session.undo()
    taken = session.undo()
    assert (taken.question, taken.answer) == ("And <image> or <image>?", second)
    assert [image.source for image in session.waiting] == [IMAGE, "images/noise_40x90.png"]
    assert ask(session, taken.question) == (prompt, second)
    session.reset()
    assert session.conversation("Hi").get_prompt() == get_template("llava_v1").system + " USER: Hi ASSISTANT:"
    with pytest.raises(InputError, match="take back"):
        session.undo()


def test_a_broken_off_answer_stays_and_an_empty_one_does_not(session: Session, loaded: Any) -> None:
    session.sampling = SamplingParams(max_new_tokens=1500)
    session.attach([LoadedImage.open(IMAGE, DEFAULT_LIMITS)])
    with session.ask("What is it?") as handle:
        next(chunk for chunk in handle if chunk.text)
    text = handle.result().text
    session.record("What is it?", text)
    assert session.exchanges[0].answer == text != ""
    assert session.waiting == ()

    session.attach([LoadedImage.open(IMAGE, DEFAULT_LIMITS)])
    with session.ask("And?"):
        pass
    session.record("And?", "")
    assert len(session.exchanges) == 1
    assert len(session.waiting) == 1


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"format": "llava-conversation-1", "exchanges": [{"question": 1}]}']
)
def test_what_is_no_saved_conversation(session: Session, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        session.load(str(tmp_path / "bad.json"), DEFAULT_LIMITS)


def test_words_and_flags_come_in_any_order() -> None:
    args = build_parser().parse_args(["a.jpg", "--temperature", "0.5", "What?", "-q"])
    assert (args.words, args.temperature, args.quiet) == (["a.jpg", "What?"], 0.5, True)


# The program


def test_one_question() -> None:
    done = run_llava("chat", *SHORT, IMAGE, "What is it?")
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


def test_one_question_as_json_from_a_pipe(tmp_path: Path) -> None:
    done = run_llava("chat", *SHORT, IMAGE, "--json", "-", stdin="What is it?\n")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    seconds = row.pop("seconds")
    assert row == {
        "question": "What is it?",
        "images": [IMAGE],
        "answer": ANSWER,
        "finish_reason": "length",
        "num_text_tokens": 84,
        "num_image_tokens": 16,
        "num_new_tokens": 8,
    }
    assert 0 < seconds["first_token"] <= seconds["total"]


def test_a_piped_conversation(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["What is it?", "", "/retry", "/nope", "/image no.png", f"/save {saved}", "/reset", "/exit", "not read"]
    done = run_llava("chat", *SHORT, IMAGE, "-q", stdin="\n".join(lines))
    assert done.stdout.splitlines() == [ANSWER, ANSWER]
    assert "\033" not in done.stdout + done.stderr
    assert done.returncode == 2
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "error"]
    rows = json.loads(saved.read_text())["exchanges"]
    assert rows == [{"images": [IMAGE], "question": "What is it?", "answer": ANSWER}]


def test_images_of_typed_lines(tmp_path: Path) -> None:
    """Paths in lines and inside of a question are attached with a message; what is none is an error, and no question."""
    long = str(HERE / IMAGE)
    lines = [
        f"What is it? {long}",
        f"'{HERE}/images/noise_40x90.png'",
        "And this?",
        "x.HEIC",
        "/none/x.HEIC what is it?",
    ]
    done = run_llava("chat", *SHORT, "--json", stdin="\n".join(lines))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["question"], row["images"]) for row in rows] == [
        ("What is it?", [long]),
        ("And this?", [f"{HERE}/images/noise_40x90.png"]),
    ]
    assert rows[0]["answer"] == ANSWER
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert told[0] == f"attached {long} (64x48)"
    assert told[1] == "asked: What is it?"
    assert [line for line in told if "error" in line] == [
        f"error: there is no image file '{name}'." for name in ("x.HEIC", "/none/x.HEIC")
    ]


def test_an_image_from_a_pipe() -> None:
    with (HERE / IMAGE).open("rb") as image:
        done = subprocess.run(
            [sys.executable, "-m", "llava", "chat", *SHORT, "What is it?", "-"],
            stdin=image, capture_output=True, text=True, cwd=HERE, env=environment(),
        )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


def test_max_new_tokens_is_fitted_to_the_context() -> None:
    done = run_llava("chat", "-m", CHECKPOINT, "--max-new-tokens", "9", "-v", " ".join(["word"] * 1010))
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stderr.splitlines() if "text and" in line)
    num_text = int(told.split()[0])
    assert f"at most {min(9, 2048 - num_text)} new ones" in told
    assert num_text > 1000


class Reader:
    """What a program says on a pipe or terminal, read as far as it is waited for."""

    def __init__(self, stream: int) -> None:
        self.stream, self.said = stream, b""

    def wait_for(self, what: bytes, seconds: float = 180) -> bytes:
        deadline = time.monotonic() + seconds
        while what not in self.said and time.monotonic() < deadline:
            if select.select([self.stream], [], [], 1)[0]:
                self.said += os.read(self.stream, 1 << 16)
        before, found, self.said = self.said.partition(what)
        assert found, before
        return before


def wait_for_keys(pid: int) -> None:
    """Until the program sleeps. Python shows a prompt before it waits for keys, and misses a signal that comes in between."""
    status = Path(f"/proc/{pid}/stat")
    if not status.exists():  # not Linux
        time.sleep(1)
        return
    deadline, asleep = time.monotonic() + 180, 0
    while asleep < 10:
        assert time.monotonic() < deadline, "it does not wait"
        time.sleep(0.02)
        asleep = asleep + 1 if status.read_text().rpartition(")")[2].split()[0] == "S" else 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    process = start_llava(
        ["chat", "-m", CHECKPOINT, IMAGE, "-v", "--max-new-tokens", "1900"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"What is it?\n/save /dev/stdout\n")
    process.stdin.flush()
    output, notes = Reader(process.stdout.fileno()), Reader(process.stderr.fileno())
    output.wait_for(b"yp")
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    notes.wait_for(b"; cancelled")
    output.wait_for(b'"question": "What is it?"')
    output.wait_for(b'"answer": "yp')
    assert process.wait(timeout=300) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")
def test_a_typed_conversation(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llava", "chat", *SHORT, IMAGE],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=HERE,
        env=environment() | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "NO_COLOR": ""},
        start_new_session=True,
    )
    os.close(theirs)
    screen = Reader(ours)
    screen.wait_for(b"> ")
    os.write(ours, b"What is it?\n")
    screen.wait_for(ANSWER.encode())
    screen.wait_for(b"> ")
    os.write(ours, b"/nope\n")
    screen.wait_for(b"\033[31merror: ")
    screen.wait_for(b"> ")
    wait_for_keys(process.pid)
    process.send_signal(signal.SIGINT)
    screen.wait_for(b"leaves")
    screen.wait_for(b"> ")
    wait_for_keys(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 0
    os.close(ours)
    assert "What is it?" in (tmp_path / "llava" / "history").read_text()


def test_a_closed_pipe_ends_quietly() -> None:
    process = start_llava(
        ["chat", "-m", CHECKPOINT, "--max-new-tokens", "300", "hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_several_images_in_the_order_given(loaded: Any) -> None:
    """Anyres: tiles of different numbers, and counts that agree with the model's."""
    done = run_llava(
        "chat", "-m", "checkpoints/llava-v1.6-tiny-vicuna", IMAGE, "images/checker_233x700.png", "--json",
        "--max-new-tokens", "4", "Compare.",
    )  # fmt: skip
    row = json.loads(done.stdout)
    assert row["images"] == [IMAGE, "images/checker_233x700.png"]
    from llava.images.layout import plan
    from llava.model.builder import load

    policy = load("checkpoints/llava-v1.6-tiny-vicuna", device="cpu").model.image_policy()
    sizes = [Image.open(HERE / source).size for source in row["images"]]
    assert row["num_image_tokens"] == sum(plan(size, policy).num_features for size in sizes)


def test_a_program_that_ends_within_an_answer_ends_cleanly() -> None:
    code = """
from llava.engine import HFEngine, Request, SamplingParams
from llava.model.builder import load
loaded = load("checkpoints/llava-v1.5-tiny-vicuna", device="cpu")
engine = HFEngine.from_loaded(loaded)
chunks = iter(engine.stream(Request(list(range(3, 20)), sampling=SamplingParams(max_new_tokens=1900))))
print(len(next(chunks).token_ids) > 0)
"""
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
