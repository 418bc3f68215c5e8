"""How many blocks of keys and values there is room for."""

from __future__ import annotations

import os

import torch

from llava.engine.decoder import Decoder
from llava.errors import InputError

HOST_SHARE = 0.25  # of the memory that is free on a CPU machine
UNKNOWN_HOST_MEMORY = 4 * 2**30  # where a system does not tell what is free
WORKSPACE = 2 * 2**30  # libraries' own buffers, recorded graphs, fragments


def num_blocks_for(
    decoder: Decoder,
    *,
    block_size: int,
    memory_fraction: float,
    max_running: int,
    max_step_tokens: int,
    context_len: int,
) -> int:
    """Blocks for every running sequence at its longest, or as many as the memory takes."""
    if decoder.device.type == "cuda":
        step_bytes = _step_bytes(decoder, max_running, max_step_tokens)
        room = _free_on_gpu(decoder.device, memory_fraction) - WORKSPACE - step_bytes
    else:
        room = int(_free_on_host() * HOST_SHARE)
    num_blocks = min(max_running * -(-context_len // block_size), room // (decoder.bytes_per_token * block_size))
    if num_blocks * block_size < min(context_len, 256):
        raise InputError(
            f"beside the model there is room for {max(num_blocks, 0) * block_size} tokens of keys and values, too few to "
            "answer anything; free some memory, raise memory_fraction, or hold the weights in 8 bits (weights='int8')"
        )
    return num_blocks


def _free_on_gpu(device: torch.device, memory_fraction: float) -> int:
    torch.cuda.empty_cache()  # what this process holds and does not use
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - memory_fraction) * total)


def _step_bytes(decoder: Decoder, max_running: int, max_step_tokens: int) -> int:
    """What the largest step needs beside weights and cache: a layer's activations, and logits in float32."""
    vocab_size, width = decoder.embedding.shape
    inner = max(layer.up.weight.shape[0] for layer in decoder.layers)
    activations = max_step_tokens * (6 * width + 2 * inner) * decoder.embedding.element_size()
    return activations + 4 * max_running * vocab_size * 4


def _free_on_host() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; macOS
        return UNKNOWN_HOST_MEMORY
