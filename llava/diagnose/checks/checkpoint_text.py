"""Checks of a checkpoint's text side: tokenizer, special tokens, embedding rows, template, context length.

In: an `ExaminedCheckpoint` whose files can be read. Out: findings. The tokenizer is loaded as `llava.load` loads it; of the
weights only headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llava.conversation import Conversation, answer_end, conv_templates, get_template, is_template
from llava.diagnose.checks.checkpoint_files import ExaminedCheckpoint, set_in_json
from llava.diagnose.checks.findings import CheckSkipped, DoctorFinding, found, reported
from llava.files import TOKENIZER_FILES, holds_tokenizer
from llava.images.layout import ImageSize, plan
from llava.model import tokenizer_setup
from llava.model.checkpoints.inspect import tokenizer_folder
from llava.text.end_token import missing_end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = "The star is yellow."
QUESTION, ANSWER = "What colour is the star?", "It is yellow."
# Templates whose models were trained with LLaMA's begin token.
LLAMA_TEMPLATES = ("llava_v1", "vicuna_v1", "v1", "llava_llama_2", "llava_v0", "v0")
MARKERS = ("<im_patch>", "<im_start>", "<im_end>")
# A tokenizer with a smaller share of the embedding rows is another model's (rows are padded, but not doubled).
LEAST_SHARE = 0.5


def check_tokenizer(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check that the tokenizer loads and decodes what it encoded."""
    folder = tokenizer_folder(checkpoint.info, checkpoint.base_info)
    if not holds_tokenizer(folder):
        yield found(
            "tokenizer-missing",
            f"{folder} holds no tokenizer",
            f"copy tokenizer.model or tokenizer.json, and tokenizer_config.json, into it (known: {', '.join(TOKENIZER_FILES)})",
            files=sorted(file.name for file in folder.iterdir())[:12],
        )
        return
    from llava.text import tokenization

    with reported("tokenizer-unreadable", "copy the tokenizer's files again", folder=str(folder)):
        bare = tokenization.load_tokenizer(folder)
        # As loading does, with the marker tokens that the config asks for.
        tokenizer = tokenizer_setup.read_tokenizer(folder, SimpleNamespace(**checkpoint.values))
    checkpoint.extras |= {"tokenizer": tokenizer, "size_without_markers": len(bare)}
    ids = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    text = tokenizer.decode(ids)
    if text.strip() != SAMPLE:
        yield found(
            "tokenizer-roundtrip",
            f"{SAMPLE!r} comes back as {text!r}",
            "copy the tokenizer's files from the language model that this one was made from",
            ids=ids[:20],
        )


def check_template(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check the conversation template against the vocabulary and the tokenizer's chat template."""
    declared = checkpoint.values.get("conv_mode")
    tokenizer = checkpoint.extras["tokenizer"]
    remedy = "copy the chat template again from where the model was published, or delete it"
    with reported("template-unreadable", remedy, folder=tokenizer.name_or_path):
        name, origin = tokenizer_setup.template_choice(checkpoint.values, tokenizer, checkpoint.folder.name)
    checkpoint.extras |= {"template": name, "template_origin": origin}
    if declared is not None and not (isinstance(declared, str) and is_template(declared)):
        yield found(
            "template-unknown",
            f"conv_mode is {declared!r}, which no template is called; {name!r} is used in its place",
            f"set conv_mode to the template of training; known: {', '.join(conv_templates)}",
            fix=set_in_json("config.json", conv_mode=None),
            conv_mode=declared,
        )
        return
    yield from judge_template(tokenizer, get_template(name), name)


def judge_template(tokenizer: PreTrainedTokenizerBase, template: Conversation, name: str) -> Iterator[DoctorFinding]:
    """Check a template against a tokenizer: its end text is a token, and the chat template frames turns alike."""
    if (end := missing_end_token(template, tokenizer)) is not None:
        yield found(
            "template-mismatch",
            f"the template {name!r} ends answers with {end!r}, which is {len(tokenizer(end).input_ids)} tokens in this "
            "vocabulary and not one: the model never learned to write it",
            "set conv_mode in config.json (or --conv-mode) to the template that the model was trained with",
            template=name,
            end_mark=end,
            eos_token=tokenizer.eos_token,
        )
        return
    theirs = _framing(lambda turns: tokenizer.apply_chat_template(turns, tokenize=False), tokenizer)
    if theirs is None:
        return
    ours = _framing(lambda turns: _rendered(template, turns), tokenizer)
    if ours is not None and ours != theirs:
        yield found(
            "chat-template",
            f"between question and answer the template {name!r} writes {ours[1]!r} and the tokenizer's chat template "
            f"{theirs[1]!r}; before a question {ours[0]!r} and {theirs[0]!r}, after an answer {ours[2]!r} and {theirs[2]!r}",
            "give the tokenizer the chat template of training (or delete it), so that other software asks as training did",
            template=list(ours),
            chat_template=list(theirs),
        )


def _rendered(template: Conversation, turns: list[dict[str, str]]) -> str:
    conversation = template.copy()
    conversation.messages = []
    for index, turn in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], turn["content"])
    return conversation.get_prompt()


def _framing(
    render: Callable[[list[dict[str, str]]], str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str, str] | None:
    """Return the text before a later question, between question and answer, and at the end of a dialogue."""
    if not tokenizer.chat_template:
        return None
    words = ["first question", "first answer", "second question", "second answer"]
    roles = ["user", "assistant", "user", "assistant"]
    try:
        text = render([{"role": role, "content": word} for role, word in zip(roles, words, strict=True)])
    except Exception:  # a chat template is a program, which may require images, tools or a system text
        return None
    places = [text.find(word) for word in words]
    if -1 in places or places != sorted(places):
        return None
    ends = [place + len(word) for place, word in zip(places, words, strict=True)]
    before_question = text[ends[1] : places[2]].strip()
    return before_question, text[ends[2] : places[3]].strip(), text[ends[3] :].strip()


def check_special_tokens(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check the begin token, the end tokens, the padding token, and the tokens that decoding leaves out."""
    tokenizer, name = checkpoint.extras["tokenizer"], checkpoint.extras["template"]
    template = get_template(name)
    prompt = _rendered(template, [{"content": QUESTION}, {"content": ANSWER}])
    ids = tokenizer(prompt).input_ids
    begin, is_own = (
        checkpoint.values.get("bos_token_id"),
        tokenizer_folder(checkpoint.info, checkpoint.base_info) == checkpoint.folder,
    )
    if (
        checkpoint.info.language_model == "llama"
        and name in LLAMA_TEMPLATES
        and begin is not None
        and tokenizer.bos_token_id is not None
        and ids[:1] != [tokenizer.bos_token_id]
    ):
        yield found(
            "begin-token",
            f"prompts begin with the ids {ids[:3]}, without the begin token {tokenizer.bos_token_id} that models with the "
            f"template {name!r} were trained with",
            "set add_bos_token to true in tokenizer_config.json",
            fix=set_in_json("tokenizer_config.json", add_bos_token=True) if is_own else None,
            first_ids=ids[:3],
            bos_token_id=begin,
        )
    yield from _end_token(checkpoint, tokenizer, answer_end(template))
    yield from _special_tokens(checkpoint, tokenizer, answer_end(template))
    pad = tokenizer.pad_token_id
    hidden = [place for place, token in enumerate(ids) if token == pad] if pad != tokenizer.eos_token_id else []
    if hidden and pad != tokenizer.unk_token_id:
        yield found(
            "pad-token",
            f"the padding token {tokenizer.pad_token!r} (id {pad}) is an ordinary one: the attention mask of a short dialogue "
            f"would hide {len(hidden)} of its {len(ids)} tokens",
            f"set pad_token in tokenizer_config.json to {tokenizer.unk_token or tokenizer.eos_token!r}",
            pad_token_id=pad,
            hidden=len(hidden),
            tokens=len(ids),
        )


def _end_token(checkpoint: ExaminedCheckpoint, tokenizer: PreTrainedTokenizerBase, end: str) -> Iterator[DoctorFinding]:
    stops = set(_as_list(checkpoint.values.get("eos_token_id")))
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        stops |= set(_as_list(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")))
    end_id = tokenizer.convert_tokens_to_ids(end) if end in tokenizer.get_vocab() else None
    ends = {token for token in (tokenizer.eos_token_id, end_id) if token is not None}
    if stops and not stops & ends:
        good = end_id if end_id is not None else tokenizer.eos_token_id
        yield found(
            "end-token",
            f"generation stops at {sorted(stops)}, and an answer ends with {end!r}"
            + (f", which is token {good}" if good is not None else ", and the tokenizer names no end token"),
            f"set eos_token_id to {good} in generation_config.json and config.json",
            fix=set_in_json(file.name if file.is_file() else "config.json", eos_token_id=good)
            if good is not None
            else None,
            eos_token_id=sorted(stops),
            tokenizer_eos=tokenizer.eos_token_id,
            end_mark=end,
        )


def _special_tokens(
    checkpoint: ExaminedCheckpoint, tokenizer: PreTrainedTokenizerBase, end: str
) -> Iterator[DoctorFinding]:
    vocabulary = tokenizer.get_vocab()
    left = {
        name: text
        for name in (end, *MARKERS)
        if name in vocabulary and (text := tokenizer.decode([vocabulary[name]], skip_special_tokens=True).strip())
    }
    if left:
        yield found(
            "special-token",
            f"{', '.join(map(repr, left))} {'is' if len(left) == 1 else 'are'} not marked as special, so decoding leaves "
            f"{', '.join(map(repr, left.values()))} in answers",
            "mark it as special in tokenizer.json and tokenizer_config.json (added_tokens_decoder)",
            **{name: vocabulary[name] for name in left},
        )


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value


def check_vocabulary(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check that embedding rows, output rows, vocab_size and the tokenizer's size agree."""
    table = checkpoint.named("embed_tokens.weight") or checkpoint.named("wte.weight")
    if table is None or len(table.shape) != 2:
        raise CheckSkipped("no embedding table is stored under a known name")
    rows, tokens = table.shape[0], len(checkpoint.extras["tokenizer"])
    without_markers = checkpoint.extras["size_without_markers"]
    size = checkpoint.values.get("vocab_size")
    grows = checkpoint.info.needs_base  # a base has fewer rows than a checkpoint that adds marker tokens to it
    numbers: dict[str, Any] = {"rows": rows, "tokens": tokens, "vocab_size": size}
    if size is not None and size != rows and not (grows and rows < size <= rows + len(MARKERS)):
        yield found(
            "vocabulary-config",
            f"vocab_size is {size}, and the embedding table has {rows} rows",
            f"set vocab_size to {rows}",
            fix=set_in_json("config.json", vocab_size=rows),
            **numbers,
        )
        return
    head = checkpoint.named("lm_head.weight")
    if head is not None and head.shape[0] != rows:
        yield found(
            "vocabulary-head",
            f"the output layer has {head.shape[0]} rows, and the embedding table {rows}",
            "copy both from one and the same save of the model",
            head_rows=head.shape[0],
            **numbers,
        )
        return
    if without_markers > rows:
        yield found(
            "vocabulary-small",
            f"the tokenizer has {without_markers} tokens, and the embedding table {rows} rows: tokens were added without "
            "resizing the model",
            "call model.resize_token_embeddings(len(tokenizer)) before training with the new tokens, or take them out again",
            **numbers,
        )
    elif tokens > rows and not grows:
        yield found(
            "marker-rows",
            f"config.json asks for marker tokens (mm_use_im_start_end, mm_use_im_patch_token), which makes {tokens} tokens, "
            f"and the embedding table has {rows} rows: the model never saw them",
            "set mm_use_im_start_end and mm_use_im_patch_token to false, as the model was trained",
            fix=set_in_json("config.json", mm_use_im_start_end=False, mm_use_im_patch_token=False),
            **numbers,
        )
    elif without_markers < LEAST_SHARE * rows:
        yield found(
            "vocabulary-other",
            f"the tokenizer has {without_markers} tokens, and the embedding table {rows} rows: it is another model's",
            "copy the tokenizer's files from the language model that this one was made from",
            **numbers,
        )


def check_context(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check that the largest image and a short question fit into the context."""
    policy = checkpoint.extras["policy"]  # of check_tiles
    tokenizer = checkpoint.extras["tokenizer"]
    prompt = _rendered(get_template(checkpoint.extras["template"]), [{"content": QUESTION}])
    text = len(tokenizer(prompt).input_ids)
    sizes = (
        policy.pinpoints if policy.cuts_tiles and policy.pinpoints else (ImageSize(policy.tile_size, policy.tile_size),)
    )
    size, features = max(((size, plan(size, policy).num_features) for size in sizes), key=lambda pair: pair[1])
    room = tokenizer_setup.context_len(checkpoint.view)
    if text + features >= room:
        yield found(
            "context-short",
            f"an image of {size.width}x{size.height} takes {features} tokens and a short question {text}, which the context "
            f"of {room} does not hold",
            "raise tokenizer_model_max_length to what the model was trained with, or use smaller pinpoints",
            image_tokens=features,
            text_tokens=text,
            context=room,
        )
