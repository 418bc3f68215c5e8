"""`auto_upgrade`: update the config of a first-generation checkpoint, whose model_type is `llama`.

In: a model folder. Out: the same folder with two keys of its config.json changed, after a confirmation at the terminal.
Loading does not need it (checkpoints/inspect.py reads old configs as they are); programs that expect the change do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llava.files import STAGING
from llava.model.checkpoints.inspect import is_legacy_config, read_config

EXPLANATION = (
    "You are using newer LLaVA code base, while the checkpoint of v0 is from older code base.\n"
    "You must upgrade the checkpoint to the new code base (this can be done automatically)."
)
QUESTION = "Please confirm that you want to upgrade the checkpoint. [Y/N]"


def auto_upgrade(config: str | Path) -> None:
    """Upgrade the config.json of a LLaVA folder whose model_type does not say so, after asking; others are not changed.

    The answer "no" ends the program with status 1, as in the original.
    """
    folder = Path(config)
    values = read_config(folder)
    if not is_legacy_config(values) or "llava" in str(values.get("model_type")):
        return
    print(EXPLANATION)
    if input(QUESTION).lower() not in ("y", "yes"):
        print("Checkpoint upgrade aborted.")
        sys.exit(1)
    print("Upgrading checkpoint...")
    values["model_type"] = "llava"
    values["architectures"] = ["LlavaLlamaForCausalLM", *values.get("architectures", [])[1:]]
    begun = folder / f"{STAGING}config.json"
    begun.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(begun, folder / "config.json")
    print("Checkpoint upgraded.")
