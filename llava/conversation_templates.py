"""The published conversation templates, as data: what each one says, who speaks, and where turns end.

Nothing here renders a prompt: `conversation.py` turns an entry of `TEMPLATES` into a `Conversation`, and its styles
(named here by `style`) decide how system text, roles, messages and separators are put together.
"""

from __future__ import annotations

from typing import Any

_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TAG_FORMAT = "The visual content will be provided with the following format: <Image>visual content</Image>."
_TAGGED_IMAGES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    f"visual content that the user provides, and assist the user with a variety of tasks using natural language.{_TAG_FORMAT}"
)
_LLAMA_2_CHAT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SIMPLE = "Answer the questions about the visual content that the user provides."
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
# The oldest template opens with one worked exchange.
_RENEWABLES = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
_WORKED_EXCHANGE = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    ("Assistant", _RENEWABLES),
)

_NAMES = ("Human", "Assistant")
_CAPITALS = ("USER", "ASSISTANT")
_MARKED = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_CHATML = ("<|im_start|>user", "<|im_start|>assistant")

# Keys: style, system, roles, sep, sep2, version, messages (the turns a template opens with). What is left out takes the
# default of `Conversation`. `version` is what other code tests ("v1...", "mpt", "...mmtag").
TEMPLATES: dict[str, dict[str, Any]] = {
    "v0": {
        "style": "SINGLE",
        "system": _CURIOUS_HUMAN,
        "roles": _NAMES,
        "sep": "###",
        "messages": _WORKED_EXCHANGE,
    },
    "v1": {
        "style": "TWO",
        "system": _CURIOUS_USER,
        "roles": _CAPITALS,
        "sep": " ",
        "sep2": "</s>",
        "version": "v1",
    },
    "llama_2": {
        "style": "LLAMA_2",
        "system": _LLAMA_2_CHAT,
        "roles": _CAPITALS,
        "sep": "<s>",
        "sep2": "</s>",
        "version": "llama_v2",
    },
    "mistral_instruct": {
        "style": "LLAMA_2",
        "system": "",
        "roles": _CAPITALS,
        "sep": "",
        "sep2": "</s>",
        "version": "llama_v2",
    },
    "chatml_direct": {
        "style": "MPT",
        "system": "<|im_start|>system\nAnswer the questions.",
        "roles": _MARKED,
        "sep": "<|im_end|>",
        "version": "mpt",
    },
    "plain": {"style": "PLAIN", "system": "", "roles": ("", ""), "sep": "\n"},
    "llava_v0": {"style": "SINGLE", "system": _CURIOUS_HUMAN, "roles": _NAMES, "sep": "###"},
    "v0_mmtag": {
        "style": "SINGLE",
        "system": _TAGGED_IMAGES,
        "roles": _NAMES,
        "sep": "###",
        "version": "v0_mmtag",
    },
    "llava_v1": {
        "style": "TWO",
        "system": _CURIOUS_HUMAN,
        "roles": _CAPITALS,
        "sep": " ",
        "sep2": "</s>",
        "version": "v1",
    },
    "v1_mmtag": {
        "style": "TWO",
        "system": _TAGGED_IMAGES,
        "roles": _CAPITALS,
        "sep": " ",
        "sep2": "</s>",
        "version": "v1_mmtag",
    },
    "llava_llama_2": {
        "style": "LLAMA_2",
        "system": _LLAVA_LLAMA_2,
        "roles": _CAPITALS,
        "sep": "<s>",
        "sep2": "</s>",
        "version": "llama_v2",
    },
    "mpt": {"style": "MPT", "system": _MPT, "roles": _MARKED, "sep": "<|im_end|>", "version": "mpt"},
    "qwen_1_5": {
        "style": "CHATML",
        "system": "<|im_start|>system\nYou are a helpful assistant.",
        "roles": _CHATML,
        "sep": "<|im_end|>",
        "version": "qwen",
    },
    "llava_llama_3": {
        "style": "LLAMA_3",
        "system": _LLAVA_LLAMA_2,
        "roles": ("user", "assistant"),
        "sep": "<|eot_id|>",
        "version": "llama_v3",
    },
    "phi_3": {
        "style": "CHATML",
        "system": "",
        "roles": ("<|user|>", "<|assistant|>"),
        "sep": "<|end|>",
        "version": "phi_3",
    },
    "gemma_instruct": {
        "style": "GEMMA",
        "system": "",
        "roles": ("<start_of_turn>user\n", "<start_of_turn>model\n"),
        "sep": "<end_of_turn>\n",
        "version": "gemma",
    },
    "qwen_2_5": {
        "style": "CHATML",
        "system": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "roles": _CHATML,
        "sep": "<|im_end|>",
        "version": "qwen",
    },
    "mistral_orca": {
        "style": "MPT",
        "system": (
            "<|im_start|>system\nYou are MistralOrca, a large language model trained by Alignment Lab AI. "
            "Write out your reasoning step-by-step to be sure you get the right answers!"
        ),
        "roles": _MARKED,
        "sep": "<|im_end|>",
        "version": "mpt",
    },
    "mistral_zephyr": {
        "style": "MPT",
        "system": "<|system|>\nYou are a helpful AI assistant.",
        "roles": ("<|user|>\n", "<|assistant|>\n"),
        "sep": "</s>",
        "version": "mpt",
    },
    "llava_llama_2_simple": {
        "style": "LLAMA_2",
        "system": _SIMPLE,
        "roles": _CAPITALS,
        "sep": "<s>",
        "sep2": "</s>",
        "version": "llama_v2",
    },
    "llava_llama_2_mmtag": {
        "style": "LLAMA_2",
        "system": f"{_SIMPLE}{_TAG_FORMAT}",
        "roles": _CAPITALS,
        "sep": "<s>",
        "sep2": "</s>",
        "version": "llama_v2_mmtag",
    },
    # Qwen 3 speaks the same markup and has no system text of its own.
    "qwen_3": {"style": "CHATML", "system": "", "roles": _CHATML, "sep": "<|im_end|>", "version": "qwen"},
    # The language models themselves have no system text.
    "llama_3": {
        "style": "LLAMA_3",
        "system": "",
        "roles": ("user", "assistant"),
        "sep": "<|eot_id|>",
        "version": "llama_v3",
    },
    "phi_4": {
        "style": "MPT",
        "system": "",
        "roles": ("<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"),
        "sep": "<|im_end|>",
        "version": "phi_4",
    },
    "phi_4_mini": {
        "style": "MPT",
        "system": "",
        "roles": ("<|user|>", "<|assistant|>"),
        "sep": "<|end|>",
        "version": "phi_4",
    },
}

# Public name -> entry above, in the order in which the names are offered. Several names may share one template.
NAMES: dict[str, str] = {
    "default": "v0",
    "v0": "v0",
    "v1": "v1",
    "vicuna_v1": "v1",
    "llama_2": "llama_2",
    "mistral_instruct": "mistral_instruct",
    "chatml_direct": "chatml_direct",
    "mistral_direct": "chatml_direct",
    "plain": "plain",
    "v0_plain": "plain",
    "llava_v0": "llava_v0",
    "v0_mmtag": "v0_mmtag",
    "llava_v1": "llava_v1",
    "v1_mmtag": "v1_mmtag",
    "llava_llama_2": "llava_llama_2",
    "mpt": "mpt",
    "qwen_1_5": "qwen_1_5",
    "qwen_3": "qwen_3",
    "qwen_2": "qwen_1_5",
    "llava_llama_3": "llava_llama_3",
    "phi_3": "phi_3",
    "gemma_instruct": "gemma_instruct",
    "qwen_2_5": "qwen_2_5",
    "llava_mistral_instruct": "mistral_instruct",
    "mistral_orca": "mistral_orca",
    "mistral_zephyr": "mistral_zephyr",
    "llava_v0_mmtag": "v0_mmtag",
    "llava_v1_mmtag": "v1_mmtag",
    "llava_llama_2_simple": "llava_llama_2_simple",
    "llava_llama_2_mmtag": "llava_llama_2_mmtag",
    "llama_3": "llama_3",
    "phi3": "phi_3",
    "phi_4": "phi_4",
    "phi_4_mini": "phi_4_mini",
}

DEFAULT_NAME = "v1"
