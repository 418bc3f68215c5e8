#!/usr/bin/env bash
# The recipes in scripts/ are those of LLaVA-1.5; this is the name under which its documents know ../finetune_lora.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../finetune_lora.sh" "$@"
