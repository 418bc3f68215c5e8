"""What `llava train --help` prints: the flags that one needs, without importing what a run needs.

In: nothing. Out: a text. All flags are arguments.py's, which `--help-all` lists.
"""

from __future__ import annotations

FIRST_FLAGS = {
    "model_name_or_path": ("MODEL", "the model to fine-tune, or the language model to build a LLaVA on"),
    "data_path": ("FILE", "samples: .json, .jsonl, .parquet, or several with commas"),
    "image_folder": ("FOLDER", "the folder that the samples' images are relative to"),
    "output_dir": ("FOLDER", "where the result and its checkpoints go"),
    "lora_enable": ("True", "train a LoRA adapter instead of all weights"),
    "bits": ("4", "keep the frozen weights in 4 or 8 bits (with lora_enable: QLoRA)"),
    "learning_rate": ("RATE", "2e-4 suits LoRA, 2e-5 all weights, 1e-3 a projector alone"),
    "num_train_epochs": ("N", "passes over the data"),
    "per_device_train_batch_size": ("N", "samples of a step on each device"),
    "gradient_accumulation_steps": ("N", "steps whose gradients are summed up"),
    "vision_tower": ("NAME", "for a new LLaVA: its vision tower"),
    "tune_mm_mlp_adapter": ("True", "pretraining: train the projector alone"),
}
TEXT = """\
usage: {name} [CONFIG.yaml] [NAME=VALUE ... | --NAME VALUE ...]

Pretrain or fine-tune a model. Names and values come from a file, the command line, or both: the command line decides.

most used:
{flags}

others:
  --print-config           print the settings as a file, and stop
  --help-all               every flag, those of transformers too (takes seconds)

examples:
  {name} scripts/configs/finetune_lora.yaml data_path=data.json image_folder=images output_dir=out
  {name} --model_name_or_path ./llava-v1.5-7b --data_path data.json --image_folder images --lora_enable True --output_dir out
"""


def short_help(name: str) -> str:
    """Return the text, for a program that was called by this name."""
    rows = [f"  {f'--{flag} {value}':<36} {about}" for flag, (value, about) in FIRST_FLAGS.items()]
    return TEXT.format(name=name, flags="\n".join(rows))
