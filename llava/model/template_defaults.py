"""The conversation template and the context length that a model's config, files and name imply.

In: the keys of a config.json, the folder of the tokenizer, the model's name. Out: the name of a template and what
decided it; a number of tokens. Nothing is loaded. Chat templates of folders are rendered by chat_template.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.chat_template import ChatTemplate, adds_begin_token, find_chat_template
from llava.conversation import (
    OWN_TEMPLATE,
    Conversation,
    SeparatorStyle,
    conv_mode_for_model_name,
    conv_templates,
    is_template,
)
from llava.errors import InputError
from llava.model.config import language_model_type

DEFAULT_CONTEXT_LEN = 2048  # tokens, where no file declares a context length
CONTEXT_KEYS = ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings", "max_seq_len")
# Templates whose first token is in no other vocabulary.
MARKED_TEMPLATES = {"<|im_start|>": "chatml_direct", "<|start_header_id|>": "llava_llama_3"}

# The conversation templates of language models whose type decides it.
CONV_MODES = {
    "mpt": "mpt",
    "mistral": "mistral_instruct",
    "mixtral": "mistral_instruct",
    "qwen2": "qwen_1_5",
    "qwen3": "qwen_1_5",
    "phi3": "phi_3",
    "gemma": "gemma_instruct",
    "gemma2": "gemma_instruct",
    "gemma3": "gemma_instruct",
    "gemma3_text": "gemma_instruct",
}
# Dialogues (system text, turns) on which a template must agree with a folder's chat template to the character.
_ASK, _SAY = "What is this?", "A red cube."
_PROBES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", (_ASK,)),
    ("", (f"<image>\n{_ASK}",)),
    ("", (f"<image>\n{_ASK}", _SAY, "Where?\nSay it.", "Left.", "Sure?")),
    ("Be brief.", (_ASK, _SAY, "Sure?")),
)
_CLOSED_PROBE = (f"{_ASK} ", f" {_SAY}", " Where?", "Left.\n")
LLAMA_CONV_MODES = ("llava_v1", "llava_llama_2", "chatml_direct", "llava_v0")


def declared_context_len(config: Mapping[str, Any]) -> int:
    """The context length that a config declares, in tokens with image features, and at most its number of positions."""
    explicit = config.get("max_sequence_length")
    if explicit is not None:
        return int(explicit)
    trained = config.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LEN
    positions = config.get("max_position_embeddings") or config.get("max_seq_len")  # MPT's word
    return int(min(trained, positions or trained))


class TemplateChoice(NamedTuple):
    """The conversation template of a model: a name for `get_template`, and what decided it."""

    name: str
    origin: str


def choose_template(
    config: Mapping[str, object], name: str, *, folder: Path | None, has_token: Callable[[str], bool]
) -> TemplateChoice:
    """Choose the conversation template of a model.

    The config's `conv_mode` decides, then the chat template in the tokenizer's folder: it is called by the name of the
    template of this package that renders the same, else by its file. Without one the model's type and name decide, and
    in the original layout too where the chat template is the one that the language model had before.

    Args:
        config: The keys of config.json.
        name: The model's name.
        folder: Where the tokenizer's files lie; None where it has none.
        has_token: Whether a text is in the vocabulary.

    Raises:
        InputError: The folder's chat template cannot be read or rendered.
    """
    declared = config.get("conv_mode")
    if isinstance(declared, str) and declared != OWN_TEMPLATE and is_template(declared):
        return TemplateChoice(declared, "named by conv_mode in config.json")
    usual = _usual_template(config, name, has_token)
    own = find_chat_template(folder) if folder is not None else None
    if own is not None and declared == OWN_TEMPLATE:
        return TemplateChoice(own.path, "the folder's chat template, as conv_mode in config.json says")
    if own is None or folder is None:
        return TemplateChoice(usual, "by the model's type and name")
    equal = _equal_template(own, folder, usual)
    if equal != usual and "text_config" not in config and _opens_alike(own, usual):
        return TemplateChoice(usual, "by the model's type and name; the folder's chat template is its language model's")
    if equal is not None:
        return TemplateChoice(equal, f"equal to the folder's chat template, {Path(own.path).name}")
    return TemplateChoice(own.path, "the folder's own chat template")


def choose_base_template(
    config: Mapping[str, object], *, folder: Path, has_token: Callable[[str], bool]
) -> TemplateChoice:
    """Choose the template for training a language model that has none of LLaVA yet: its own chat template.

    It is called by the name of the template of this package that renders the same, else by its file. Without one the model's
    type decides.

    Raises:
        InputError: The folder has no chat template and the type implies none, or the chat template cannot be rendered.
    """
    own = find_chat_template(folder)
    by_model = CONV_MODES.get(language_model_type(config))
    if own is not None:
        equal = _equal_template(own, folder, by_model or "llava_v1")
        if equal is not None and _closes_alike(own, folder, equal):
            return TemplateChoice(equal, f"equal to the chat template in {Path(own.path).name}")
        return TemplateChoice(own.path, "the language model's chat template")
    by_token = next((template for token, template in MARKED_TEMPLATES.items() if has_token(token)), None)
    chosen = by_model or by_token
    if chosen is None:
        raise InputError(
            f"{folder} has no chat template, and its type implies none; name a template: {', '.join(conv_templates)}"
        )
    return TemplateChoice(chosen, "by the language model's type and tokens")


def _usual_template(config: Mapping[str, object], name: str, has_token: Callable[[str], bool]) -> str:
    if config.get("model_type") == "vipllava" or config.get("mm_projector_type") == "norm_mlp2x_gelu":
        return "llava_v0"  # ViP-LLaVA
    by_name = conv_mode_for_model_name(name)
    by_model = CONV_MODES.get(language_model_type(config))
    if by_model is not None:
        return by_model
    by_token = next((template for token, template in MARKED_TEMPLATES.items() if has_token(token)), None)
    if by_token is not None:
        return by_token
    # `llava_v0` is also the result for names that are not known: use it only where the name contains "v0".
    if by_name in LLAMA_CONV_MODES and (by_name != "llava_v0" or "v0" in name.lower()):
        return by_name
    return "llava_v1"


def _equal_template(own: ChatTemplate, folder: Path, usual: str) -> str | None:
    """The template that renders every probe as the folder's chat template does; `usual` is tried first."""
    begin = own.special_tokens.get("bos_token", "")
    expected: list[str | None] = []
    for system, texts in _PROBES:
        try:
            prompt = own.prompt(_turns(texts), system=system, is_open=True)
        except InputError:
            if not system:  # some templates know no system text
                raise
            expected.append(None)
            continue
        # The templates of this package leave the begin token to the tokenizer.
        is_added = bool(begin) and prompt.startswith(begin) and adds_begin_token(folder, begin)
        expected.append(prompt.removeprefix(begin) if is_added else prompt)
    for name in (usual, *conv_templates):
        if conv_templates[name].sep_style != SeparatorStyle.PLAIN and all(
            prompt is None or prompt == _rendered(conv_templates[name], system, texts)
            for prompt, (system, texts) in zip(expected, _PROBES, strict=True)
        ):
            return name
    return None


def _closes_alike(own: ChatTemplate, folder: Path, name: str) -> bool:
    """Whether a template renders a whole dialogue, as training does, like a folder's chat template, white space included."""
    theirs = own.prompt(_turns(_CLOSED_PROBE), is_open=False)
    begin = own.special_tokens.get("bos_token", "")
    if begin and adds_begin_token(folder, begin):
        theirs = theirs.removeprefix(begin)
    conversation = conv_templates[name].copy()
    for index, text in enumerate(_CLOSED_PROBE):
        conversation.append_message(conversation.roles[index % 2], text)
    # Some templates end a dialogue with another token.
    return theirs.startswith(conversation.get_prompt().rstrip("\n"))


def _opens_alike(own: ChatTemplate, usual: str) -> bool:
    """Whether two templates ask a first question alike, but for white space and a default system text.

    LLaVA's training renders prompts by its own templates, and leaves the chat template of the language model in the folder. The
    two then differ in what stands around answers (llava-v1.6-mistral) or between turns (llava-v1.6-34b).
    """
    system, texts = _PROBES[1]
    prompt = own.prompt(_turns(texts), system=system, is_open=True)
    ours = "".join(_rendered(conv_templates[usual], system, texts).split())
    return ours.endswith("".join(prompt.removeprefix(own.special_tokens.get("bos_token", "")).split()))


def _turns(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


def _rendered(template: Conversation, system: str, texts: Sequence[str]) -> str:
    conversation = template.with_system(system) if system else template.copy()
    for index, text in enumerate((*texts, None)):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()
