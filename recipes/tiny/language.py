"""Train the small LLaMA-type language model on text alone, before it sees images.

In: the tokenizer; dialogues are made here, each about an image that is described in words where the image will be.
Out: FOLDER with config.json, model.safetensors and the tokenizer's files, and report.json.
The tokens around the description are exactly those that LLaVA's v1 template puts around an image.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import wordings
from arrays import BOS, EOS
from optim import build_optimizer, learning_rate
from photos import blank_photos
from samples import Source, draw_sample
from talk import converse
from tokenizer import SYSTEM, build_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SHARES = {"scene": 0.5, "sign": 0.09, "text": 0.15, "photo": 0.1, "chart": 0.04, "pair": 0.08, "talk": 0.04}
CHUNK = 400


def dialogue(seed: int, pieces: sentencepiece.SentencePieceProcessor, source: Source) -> list[int]:
    """Ids of one conversation about one described image."""
    rng = random.Random(f"dialogue-{seed}-{source.held}")
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    sample = draw_sample(kind, 10_000_000 + seed, source)
    ids = [BOS]
    for number, turn in enumerate(converse(source.asker(rng), sample.questions, rng.randint(2, 6))):
        text = f"{turn.question} ASSISTANT: {turn.answer}"
        if number:
            ids += pieces.encode(f"USER: {text}")
        elif sample.caption:
            ids += pieces.encode(f"{SYSTEM} USER: ") + pieces.encode(sample.caption) + pieces.encode(f"\n{text}")
        else:
            ids += pieces.encode(f"{SYSTEM} USER: {text}")
        ids.append(EOS)
    return ids


def dialogues(first: int, *, count: int, tokenizer: Path, source: Source) -> np.ndarray:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    return np.concatenate([np.asarray(dialogue(first + i, pieces, source), dtype=np.uint16) for i in range(count)])


def write_stream(num: int, tokenizer: Path, source: Source, *, workers: int) -> np.ndarray:
    """All dialogues one after another."""
    chunk = min(CHUNK, num)
    job = partial(dialogues, count=chunk, tokenizer=tokenizer, source=source)
    wordings.prepare()
    with ProcessPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(job, range(0, num, chunk))))


def open_stream(args: argparse.Namespace, source: Source) -> np.ndarray:
    """The dialogues made before, or new ones, which are kept if a file was named."""
    if args.stream is not None and args.stream.exists():
        return np.load(args.stream)
    stream = write_stream(args.dialogues, args.tokenizer, source, workers=args.workers)
    if args.stream is not None:
        part = args.stream.with_suffix(".part.npy")
        np.save(part, stream)
        part.replace(args.stream)
    return stream


def build_model(vocab: int, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: Tensor, args: argparse.Namespace) -> int:
    """Next-token prediction; returns the number of steps done."""
    device = rows.device
    optimizer = build_optimizer(model, args.lr)

    def loss_of(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss_fn: Callable[[Tensor], Tensor] = loss_of
    if args.compile:
        loss_fn = torch.compile(loss_of)
        try:
            with torch.autocast(device.type, torch.bfloat16):
                loss_fn(rows[: args.batch]).backward()
            optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # without a C compiler the plain model must do
            print(json.dumps({"stage": "language", "compile_failed": f"{type(error).__name__}: {str(error)[:300]}"}))
            loss_fn = loss_of
    started, steps = time.time(), 0
    for step in range(args.steps):
        elapsed = (time.time() - started) / 60
        progress = max(step / args.steps, elapsed / args.max_minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress)
        ids = rows[torch.randint(len(rows), (args.batch,), device=device)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_fn(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps = step + 1
        if step % args.report_steps == 0:
            row = {"stage": "language", "step": step, "minutes": round(elapsed, 2), "loss": round(loss.item(), 4)}
            row["tokens_per_second"] = round(steps * ids.numel() / max(1e-9, time.time() - started))
            print(json.dumps(row), flush=True)
    return steps


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, args: argparse.Namespace, device: torch.device) -> dict[str, float | list[str]]:
    """Short answers told exactly, from a description, on held-out dialogues; and three answers to read."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model"))
    source = Source(args.fonts, blank_photos(), held=True)
    right = total = 0
    samples = []
    model.eval()
    for seed in range(args.checks):
        ids = dialogue(seed, pieces, source)
        end = ids.index(EOS)
        mark = pieces.encode(" ASSISTANT:")[-1]
        begin = ids.index(mark) + 1
        logits = model(input_ids=torch.tensor([ids[:end]], device=device), use_cache=False).logits[0]
        guess = logits[begin - 1 : end].argmax(-1).tolist()
        total += 1
        right += guess == ids[begin : end + 1]
        if seed < 3:
            samples.append(
                f"{pieces.decode(ids[:begin])[len(SYSTEM) :]} -> {pieces.decode([g for g in guess if g != EOS])}"
            )
    return {"answers_exact": round(right / max(1, total), 4), "samples": samples}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of the tokenizer; made if it is not there"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the language model")
    parser.add_argument("--fonts", type=Path)
    parser.add_argument("--dialogues", type=int, default=160_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--max-minutes", type=float, default=1.2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=896)
    parser.add_argument("--checks", type=int, default=200, help="held-out dialogues to answer at the end")
    parser.add_argument("--report-steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--tokenizer-only", action="store_true", help="make the tokenizer and stop")
    parser.add_argument("--stream", type=Path, help="file of the dialogues' ids (.npy); made if it is not there")
    parser.add_argument("--stream-only", action="store_true", help="make the dialogues and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    started = time.time()
    source = Source(args.fonts, blank_photos())
    if not (args.tokenizer / "tokenizer.model").exists():
        size = build_tokenizer(args.tokenizer, source)
        print(
            json.dumps({"stage": "tokenizer", "pieces": size, "seconds": round(time.time() - started, 1)}), flush=True
        )
    if args.tokenizer_only:
        return 0
    stream = open_stream(args, source)
    made = {"stage": "language", "tokens": len(stream), "text_seconds": round(time.time() - started, 1)}
    print(json.dumps(made), flush=True)
    if args.stream_only:
        return 0
    torch.manual_seed(0)
    device = torch.device(args.device)
    keep = len(stream) // args.length * args.length
    rows = torch.from_numpy(stream[:keep].reshape(-1, args.length).astype(np.int64)).to(device)
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model")).vocab_size()
    model = build_model(vocab, args).to(device)
    steps = train(model, rows, args)
    model.save_pretrained(args.out)
    for file in args.tokenizer.iterdir():
        shutil.copyfile(file, args.out / file.name)
    report: dict[str, object] = {"stage": "language", "steps": steps, "tokens_seen": steps * args.batch * args.length}
    report |= {"parameters": model.num_parameters()} | evaluate(model, args, device)
    report["seconds"] = round(time.time() - started, 1)
    (args.out / "report.json").write_text(json.dumps(report) + "\n")
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
