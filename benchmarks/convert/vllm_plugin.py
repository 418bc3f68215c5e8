"""vLLM on checkpoints in the original layout, through the plugin: greedy tokens compared with this package's own model.

In: a machine with a GPU and vLLM (the plugin was written for 0.22.0). Out: a table of checkpoints: equal prompts, equal tokens,
and the margin between the two most probable tokens where the answers differ first. It is written after each checkpoint, and
a run that failed is a row that says so. Checkpoints are the embedded model, and random weights in real shapes, made on the
way. vLLM runs in a process of its own and finds the plugin by its entry point, as `vllm serve` does; where this package is
only on PYTHONPATH, an entry point is made for that process.

    python -m benchmarks.convert.vllm_plugin --checkpoints embedded tiny tiny-tiles 7b \\
        --output benchmarks/results/vllm_plugin.md

A name may be followed by a dtype, as in `7b:bfloat16`; in float32 rounding differs least.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measure import add_output, publish, table

IMAGES = ("demo.jpg", "counting.png", "wide.png")
QUESTIONS = ("What do you see in this picture?", "How many shapes are there?")
NUM_TOKENS = 32
KV_CACHE_BYTES = 8 * 2**30  # given to vLLM, so that it does not measure a GPU that our model uses at the same time
# name -> (size of random numbers, tiles)
RANDOM = {"tiny": ("tiny", False), "tiny-tiles": ("tiny", True), "7b": ("7b", False), "7b-tiles": ("7b", True)}


def cases() -> list[tuple[str, str]]:
    return [(str(ROOT / "images" / image), question) for image in IMAGES for question in QUESTIONS]


def ask_vllm(checkpoint: str, dtype: str) -> list[dict[str, Any]]:
    """Return vLLM's greedy tokens; prompts are rendered by the chat template that vLLM finds. Runs in vLLM's process."""
    import base64

    from vllm import LLM, SamplingParams

    model = LLM(model=checkpoint, dtype=dtype, gpu_memory_utilization=0.1, kv_cache_memory_bytes=KV_CACHE_BYTES,
                enforce_eager=True, limit_mm_per_prompt={"image": 1}, seed=0)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, detokenize=False)
    answers = []
    for image, question in cases():
        data = base64.b64encode(Path(image).read_bytes()).decode()
        kind = "jpeg" if image.endswith("jpg") else "png"
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}},
            {"type": "text", "text": question},
        ]
        output = model.chat([{"role": "user", "content": content}], sampling)[0]
        answers.append({"prompt_ids": list(output.prompt_token_ids), "ids": list(output.outputs[0].token_ids)})
    return answers


def ask_ours(checkpoint: str, dtype: str) -> list[dict[str, Any]]:
    """Return our model's greedy tokens, and the margin of each over the second most probable one."""
    import torch

    from benchmarks.convert.greedy import greedy_answer
    from llava.model.builder import load

    loaded = load(checkpoint, device="cuda", dtype=dtype)
    answers = []
    for image, question in cases():
        inputs, output, _ = greedy_answer(loaded, question, Path(image), NUM_TOKENS)
        top = torch.stack(output.logits)[:, 0].float().topk(2).values
        answers.append(
            {
                "prompt_ids": inputs.input_ids.tolist(),
                "num_prompt": inputs.num_tokens,
                "ids": output.sequences[0].tolist(),
                "margins": (top[:, 0] - top[:, 1]).tolist(),
            }
        )
    return answers


def start(which: str, checkpoint: str, dtype: str, scratch: Path, vllm_site: Path | None) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if which == "vllm":
        # Triton multiplies float32 with the 10 bits of TF32 otherwise; vLLM's attention in float32 is made of it.
        environment["TRITON_F32_DEFAULT"] = "ieee"
        # Libraries for top-p sampling and 8-bit products, of which this needs neither.
        environment |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_DEEP_GEMM_WARMUP": "skip"}
        if vllm_site is not None:
            paths.insert(0, str(vllm_site))
        if not [point for point in entry_points(group="vllm.general_plugins") if point.name == "llava"]:
            described = scratch / "plugin" / "llava_plugin-0.dist-info"
            described.mkdir(parents=True, exist_ok=True)
            (described / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-plugin\nVersion: 0\n")
            (described / "entry_points.txt").write_text(
                "[vllm.general_plugins]\nllava = llava.convert.vllm.plugin:register\n"
            )
            paths.append(str(described.parent))
    result = str(scratch / f"{which}.json")
    command = [sys.executable, "-m", "benchmarks.convert.vllm_plugin", "--run", which, checkpoint, dtype, result]
    with (scratch / f"{which}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def answers_of_both(
    checkpoint: str, dtype: str, scratch: Path, vllm_site: Path | None, timeout: float
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the answers of vLLM and of our model, and one sentence for each of them that failed."""
    deadline = time.monotonic() + timeout
    running = {which: start(which, checkpoint, dtype, scratch, vllm_site) for which in ("vllm", "ours")}
    answers, failures = {}, []
    for which, process in running.items():
        try:
            status = process.wait(max(deadline - time.monotonic(), 0))
            failure = "" if status == 0 else f"ended with {status}"
        except subprocess.TimeoutExpired:
            failure = f"did not end within {timeout:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
            process.wait()
        if failure:
            print((scratch / f"{which}.log").read_text(errors="replace")[-6000:], flush=True)
            failures.append(f"{which} {failure}")
        else:
            answers[which] = json.loads((scratch / f"{which}.json").read_text())
    return answers, failures


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> tuple[str, ...]:
    prompts = equal = total = 0
    margins = []
    for their, our in zip(theirs, ours, strict=True):
        prompts += len(their["prompt_ids"]) == our["num_prompt"]
        pairs = list(zip(their["ids"], our["ids"], strict=False))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal += same
        total += len(our["ids"])
        if same < len(pairs):
            margins.append(our["margins"][same])
    parted = f"{max(margins):.2g} at most" if margins else "nowhere"
    smallest = min(min(our["margins"]) for our in ours)
    return f"{prompts} of {len(ours)}", f"{equal} of {total}", parted, f"{smallest:.2g}"


def versions_in(site: Path | None) -> str:
    """Versions of vLLM and of the transformers beside it."""
    from importlib.metadata import distributions

    found = distributions(path=[str(site), *sys.path] if site is not None else sys.path)
    versions: dict[str, str] = {}
    for distribution in found:
        versions.setdefault(distribution.name.lower(), distribution.version)
    return f"vLLM {versions.get('vllm', 'missing')} with transformers {versions.get('transformers', 'missing')}"


def describe(rows: list[tuple[str, ...]], vllm_site: Path | None) -> str:
    import torch
    import transformers

    conditions = (
        f"vLLM through the plugin beside `model.generate`, {len(cases())} prompts with an image, {NUM_TOKENS} new tokens; "
        f"one {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}, "
        f"{versions_in(vllm_site)}; ours with transformers {transformers.__version__}."
    )
    columns = ["checkpoint", "dtype", "prompts of equal length", "equal tokens until the first difference"]
    columns += ["margin at the first difference", "smallest margin", "seconds"]
    return f"{conditions}\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vLLM's greedy tokens with ours on original checkpoints.")
    parser.add_argument("--checkpoints", nargs="+", default=["embedded", "tiny", "tiny-tiles", "7b"])
    parser.add_argument("--vllm-site", type=Path, help="a folder with vLLM and what it needs, for its process alone")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one checkpoint")
    parser.add_argument("--scratch", type=Path, help="where random checkpoints are made: 14 GB for 7b")
    add_output(parser)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        which, checkpoint, dtype, result = args.run
        ask = {"vllm": ask_vllm, "ours": ask_ours}[which]
        Path(result).write_text(json.dumps(ask(checkpoint, dtype)))
        return

    from benchmarks.random_checkpoint import make
    from llava.assets import embedded_model_path

    rows: list[tuple[str, ...]] = []
    failed = False
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for number, wanted in enumerate(args.checkpoints):
            name, _, dtype = wanted.partition(":")
            dtype = dtype or "float32"
            checkpoint = Path(folder) / f"llava-random-{name}" if name in RANDOM else embedded_model_path()
            if name in RANDOM and not checkpoint.exists():
                began = time.monotonic()
                make(checkpoint, RANDOM[name][0], tiles=RANDOM[name][1], dtype="float16")
                print(f"made {checkpoint} in {time.monotonic() - began:.0f} s", flush=True)
            began = time.monotonic()
            scratch = Path(folder) / str(number)
            scratch.mkdir()
            answers, failures = answers_of_both(str(checkpoint), dtype, scratch, args.vllm_site, args.timeout)
            result = ("; ".join(failures), "", "", "") if failures else compare(answers["vllm"], answers["ours"])
            failed |= bool(failures)
            rows.append((name, dtype, *result, f"{time.monotonic() - began:.0f}"))
            publish(describe(rows, args.vllm_site), args.output)
    sys.exit(failed)


if __name__ == "__main__":
    main()
