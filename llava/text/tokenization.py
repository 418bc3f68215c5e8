"""Load the tokenizer of a checkpoint, and turn prompts with `<image>` placeholders into token ids.

In: a folder, a prompt. Out: a `Tokenizer`; ids with -200 for each image; and for each id the character of the prompt
that decides which span it belongs to (`encode_with_offsets`), from which labels.py makes labels. The sentencepiece
tokenizer itself is in sentencepiece_tokenizer.py. Torch is imported only where a tensor is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.files import holds_tokenizer, read_json
from llava.text.sentencepiece_tokenizer import LlamaSentencePieceTokenizer

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, PreTrainedTokenizerFast

FAST_LLAMA = "LlamaTokenizerFast"  # version 4 loads it by its tokenizer.json although asked for a slow class
# Class names under which sentencepiece LLaMA tokenizers were saved; None: the folder has no tokenizer_config.json.
_LLAMA_CLASSES = (None, "LlamaTokenizer", FAST_LLAMA, "LlamaSentencePieceTokenizer")


class Tokenizer(Protocol):
    """What this package asks of a tokenizer: a part of transformers' `PreTrainedTokenizerBase`."""

    name_or_path: str
    is_fast: bool
    model_max_length: int
    padding_side: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    all_special_ids: list[int]
    all_special_tokens: list[str]

    def __len__(self) -> int: ...
    def __call__(self, text: str, **options: object) -> BatchEncoding: ...
    def decode(
        self, token_ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False, **options: object
    ) -> str: ...
    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def get_vocab(self) -> dict[str, int]: ...
    def add_tokens(self, new_tokens: list[str], special_tokens: bool = False) -> int: ...
    def add_special_tokens(self, special_tokens_dict: dict[str, str]) -> int: ...
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]: ...


def load_tokenizer(
    path: str | os.PathLike[str], *, model_max_length: int | None = None, padding_side: str = "right"
) -> Tokenizer:
    """Load the tokenizer of a folder, of the class that its files call for.

    `tokenizer.model` of a LLaMA-type model is read by the sentencepiece library, even where a `tokenizer.json` (a
    conversion of it) lies beside it, unless the folder's config names the fast class, with which the model was trained.
    Otherwise `tokenizer.json` is taken literally; other files go to transformers.
    Without `model_max_length` (in tokens), the folder's own is kept.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"there is no tokenizer folder {str(path)!r}; give the folder that holds tokenizer.model or tokenizer.json."
        )
    options: dict[str, object] = {"padding_side": padding_side}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    load = _choose_loader(folder)
    try:
        tokenizer = load(str(folder), **options)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        if isinstance(error, RecursionError):
            for file in sorted(folder.glob("*.json")):
                read_json(file)  # names the one that is nested too deep
        ours = _input_error_behind(error)
        if ours is not None:
            raise ours from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {reason[0]}; fetch its files again.") from error
    for name, is_usable, words in (
        ("model_max_length", isinstance(tokenizer.model_max_length, (int, float)), "a number"),
        ("unk_token", tokenizer.unk_token != "", "a token"),  # an unknown token would be looked up without end
    ):
        if not is_usable:
            raise InputError(f"the tokenizer in {folder} has {name} {getattr(tokenizer, name)!r}; it must be {words}.")
    return tokenizer


def _input_error_behind(error: BaseException | None) -> InputError | None:
    """Our own error, where loading by transformers turned it into another one."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def _choose_loader(folder: Path) -> Callable[..., Tokenizer]:
    tokenizer_class = _tokenizer_config(folder).get("tokenizer_class")
    has_json = (folder / "tokenizer.json").is_file()
    is_fast = has_json and tokenizer_class == FAST_LLAMA
    if (folder / "tokenizer.model").is_file() and tokenizer_class in _LLAMA_CLASSES and not is_fast:
        return LlamaSentencePieceTokenizer.from_pretrained
    if has_json:
        return _load_tokenizer_json
    if holds_tokenizer(folder):
        return _load_by_transformers
    raise InputError(
        f"{folder} holds no tokenizer: none of tokenizer.model, tokenizer.json, vocab.json is there; copy these files "
        "from the language model that it was made from, or name that model as the base."
    )


def _load_tokenizer_json(folder: str, **options: object) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    config = _tokenizer_config(Path(folder))
    # Version 5 ignores this setting of a file unless asked not to; earlier versions obeyed it.
    if config.get("clean_up_tokenization_spaces"):
        options["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
    if config.get("tokenizer_class") == FAST_LLAMA:
        _obey_begin_and_end(tokenizer, config)
    return tokenizer


def _obey_begin_and_end(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, object]) -> None:
    """Let the begin and end tokens be added as the config says; version 4's class of this name does not ask the file."""
    from tokenizers.processors import TemplateProcessing

    before = [tokenizer.bos_token] if config.get("add_bos_token", True) else []
    after = [tokenizer.eos_token] if config.get("add_eos_token", False) else []
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
    second = [f"{token}:1" for token in before], [f"{token}:1" for token in after]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second[0], "$B:1", *second[1]],
        special_tokens=added,
    )


def _load_by_transformers(folder: str, **options: object) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _tokenizer_config(folder: Path) -> Mapping[str, object]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


# Prompts with image placeholders


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Tokenizer, image_token_index: int = ..., return_tensors: None = None
) -> list[int]: ...


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Tokenizer, image_token_index: int = ..., *, return_tensors: str
) -> torch.Tensor: ...


def tokenizer_image_token(
    prompt: str, tokenizer: Tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Encode a prompt, with `image_token_index` for every `<image>`: a list, or a tensor (T,) if return_tensors is "pt"."""
    chunks = [_encode_ids(chunk, tokenizer) for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    skip = _num_repeated(chunks, tokenizer)
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, image_token_index, *chunk[skip:]]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise InputError(f"Unsupported tensor type: {return_tensors}; the only one is 'pt'.")
    import torch

    return torch.tensor(ids, dtype=torch.long)


def encode_with_offsets(
    text: str, tokenizer: Tokenizer, image_token_index: int | None = IMAGE_TOKEN_INDEX
) -> tuple[list[int], list[int]]:
    """Encode a text, and say for each token which character decides the span that it belongs to.

    With `image_token_index` None, `<image>` is text like any other.

    Returns:
        The ids of `tokenizer_image_token`, and as many offsets into `text`: a token's last character; for a token
        without text of its own (an added space), the character after it; for an image, the last character of its
        placeholder; -1 for tokens that open or close the sequence.

    Raises:
        InputError: the tokenizer does not say where its tokens lie.
    """
    parts = [text] if image_token_index is None else text.split(DEFAULT_IMAGE_TOKEN)
    encoded = [_encode_part(part, tokenizer) for part in parts]
    skip = _num_repeated([ids for ids, _ in encoded], tokenizer)
    all_ids: list[int] = []
    all_offsets: list[int] = []
    start = 0
    for index, (part, (ids, offsets)) in enumerate(zip(parts, encoded, strict=True)):
        if index and image_token_index is not None:
            all_ids.append(image_token_index)
            all_offsets.append(start + len(DEFAULT_IMAGE_TOKEN) - 1)
            start += len(DEFAULT_IMAGE_TOKEN)
        first = skip if index else 0
        all_ids += ids[first:]
        all_offsets += [offset if offset < 0 else start + offset for offset in offsets[first:]]
        start += len(part)
    return all_ids, all_offsets


def _num_repeated(chunks: list[list[int]], tokenizer: Tokenizer) -> int:
    """1 where the tokenizer opens every chunk with its begin token, which only the first may keep."""
    return int(all(chunk[:1] == [tokenizer.bos_token_id] for chunk in chunks))


def num_doubled(ids: list[int], text: str, tokenizer: Tokenizer) -> int:
    """1 where a text begins with the begin token, as chat templates write it, and the tokenizer has added another."""
    begin = tokenizer.bos_token
    return int(bool(begin) and text.startswith(str(begin)) and ids[:2] == [tokenizer.bos_token_id] * 2)


def _encode_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    if isinstance(tokenizer, LlamaSentencePieceTokenizer):
        return tokenizer.encode_ids(text)  # the same ids, in less time
    return list(tokenizer(text).input_ids)


def _encode_part(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    if isinstance(tokenizer, LlamaSentencePieceTokenizer):
        pieces = tokenizer.pieces(text)
        inner = tokenizer.convert_tokens_to_ids([token for token, _, _ in pieces])
        ids = tokenizer.build_inputs_with_special_tokens(inner)
        before, after = int(tokenizer.add_bos_token), int(tokenizer.add_eos_token)
        return ids, [-1] * before + [_offset(start, end) for _, start, end in pieces] + [-1] * after
    if not tokenizer.is_fast:
        raise InputError(
            f"a tokenizer of class {type(tokenizer).__name__} does not say where its tokens lie in the text, which "
            "labels need; use one with a tokenizer.json."
        )
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    spans = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return list(encoded["input_ids"]), [-1 if is_added else _offset(*span) for span, is_added in spans]


def _offset(start: int, end: int) -> int:
    return end - 1 if end > start else start
