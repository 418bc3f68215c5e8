"""vLLM on checkpoints in the original layout, through the plugin: the same greedy tokens as this package's own model?

In: a machine with a GPU and vLLM (0.22.0 is what the plugin was written for). Out: a table of checkpoints, prompts, how
many tokens are equal, and by how much the likeliest token led where the two part. Checkpoints are the embedded model and
ones of random numbers in real shapes, made on the way. vLLM runs in a process of its own and finds the plugin by the entry
point, as `vllm serve` does; where this package is only on PYTHONPATH, an entry point is laid beside it for that process.

    python benchmarks/vllm_plugin.py --checkpoints embedded tiny tiny-tiles 7b --output benchmarks/results/vllm_plugin.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ("demo.jpg", "counting.png", "wide.png")
QUESTIONS = ("What do you see in this picture?", "How many shapes are there?")
NUM_TOKENS = 32
# name -> (size of random numbers, tiles)
RANDOM = {"tiny": ("tiny", False), "tiny-tiles": ("tiny", True), "7b": ("7b", False), "7b-tiles": ("7b", True)}


def cases() -> list[tuple[str, str]]:
    return [(str(ROOT / "images" / picture), question) for picture in PICTURES for question in QUESTIONS]


def ask_vllm(checkpoint: str, dtype: str) -> list[dict[str, Any]]:
    """Runs in vLLM's process: prompts rendered by the chat template that vLLM finds."""
    import base64

    from vllm import LLM, SamplingParams

    model = LLM(model=checkpoint, dtype=dtype, max_model_len=4096, gpu_memory_utilization=0.6, enforce_eager=True,
                limit_mm_per_prompt={"image": 1}, seed=0)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, detokenize=False)
    answers = []
    for picture, question in cases():
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        kind = "jpeg" if picture.endswith("jpg") else "png"
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}},
            {"type": "text", "text": question},
        ]
        output = model.chat([{"role": "user", "content": content}], sampling)[0]
        answers.append({"prompt_ids": list(output.prompt_token_ids), "ids": list(output.outputs[0].token_ids)})
    return answers


def ask_ours(checkpoint: str, dtype: str) -> list[dict[str, Any]]:
    """Our model's greedy tokens, with the margin of each over the next likely one."""
    import torch
    from PIL import Image

    from llava.conversation import get_template
    from llava.model.builder import load

    loaded = load(checkpoint, device="cuda", dtype=dtype)
    assert loaded.processor is not None
    answers = []
    for picture, question in cases():
        conversation = get_template(loaded.conv_mode)
        conversation.append_message(conversation.roles[0], f"{loaded.processor.image_mark}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        inputs = loaded.processor(conversation, [Image.open(picture)])
        output = loaded.model.generate(
            inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, do_sample=False,
            max_new_tokens=NUM_TOKENS, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
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


def in_a_process(which: str, checkpoint: str, dtype: str, scratch: Path) -> list[dict[str, Any]]:
    result = scratch / f"{which}.json"
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if not [point for point in entry_points(group="vllm.general_plugins") if point.name == "llava"]:
        described = scratch / "plugin" / "llava_plugin-0.dist-info"
        described.mkdir(parents=True, exist_ok=True)
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-plugin\nVersion: 0\n")
        (described / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nllava = llava.convert.vllm_plugin:register\n"
        )
        paths.append(str(described.parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--run", which, checkpoint, dtype, str(result)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(result.read_text())


def compare(name: str, checkpoint: str, dtype: str, scratch: Path) -> str:
    theirs, ours = (in_a_process(which, checkpoint, dtype, scratch) for which in ("vllm", "ours"))
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
    return f"| {name} | {dtype} | {prompts} of {len(ours)} | {equal} of {total} | {parted} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vLLM's greedy tokens with ours on original checkpoints.")
    parser.add_argument("--checkpoints", nargs="+", default=["embedded", "tiny", "tiny-tiles", "7b"])
    parser.add_argument("--dtype", default="float32", help="float32 leaves least room for different roundings")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        which, checkpoint, dtype, result = args.run
        ask = {"vllm": ask_vllm, "ours": ask_ours}[which]
        Path(result).write_text(json.dumps(ask(checkpoint, dtype)))
        return

    import torch
    from random_checkpoint import make

    from llava.assets import embedded_model_path

    rows = []
    for name in args.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            checkpoint = str(embedded_model_path()) if name == "embedded" else name
            if name in RANDOM:
                checkpoint = str(scratch / f"llava-random-{name}")
                make(Path(checkpoint), RANDOM[name][0], tiles=RANDOM[name][1], dtype="float16")
            rows.append(compare(name, checkpoint, args.dtype, scratch))
            print(rows[-1], flush=True)
    table = "\n".join(
        [
            f"vLLM through the plugin beside `model.generate`, {len(cases())} prompts with a picture, {NUM_TOKENS} new tokens; "
            f"one {torch.cuda.get_device_name()}, torch {torch.__version__}.",
            "",
            "| checkpoint | dtype | prompts of equal length | equal tokens until they part | margin where they part |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
