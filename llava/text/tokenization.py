"""Loading the tokenizer of a checkpoint, and turning prompts with `<image>` marks into ids.

In: a folder, a prompt. Out: a transformers tokenizer; ids with -200 for each image; and for each id the place in the
prompt that decides whose token it is (`encode_with_places`), from which labels.py makes labels. The sentencepiece
tokenizer itself is in sentencepiece_tokenizer.py. Torch is imported only where a tensor is asked for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.text.sentencepiece_tokenizer import LlamaSentencePieceTokenizer

__all__ = [
    "LlamaSentencePieceTokenizer",
    "encode_with_places",
    "load_tokenizer",
    "tokenizer_image_token",
]

# Vocabularies of other tokenizers. Without any of these, transformers would make an empty one and not say so.
_OTHER_FILES = (
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "tiktoken.model",
    "sentencepiece.bpe.model",
)
# Class names under which sentencepiece LLaMA tokenizers were saved; None: the folder has no tokenizer_config.json.
_LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "LlamaSentencePieceTokenizer")


def load_tokenizer(
    path: str | os.PathLike[str], *, model_max_length: int | None = None, padding_side: str = "right"
) -> Any:
    """The tokenizer that lies in a folder, of the class that its files call for.

    `tokenizer.model` of a LLaMA-type model is read by the sentencepiece library, also where a `tokenizer.json` lies
    beside it (a conversion of it). Otherwise `tokenizer.json` is taken literally; other files go to transformers.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"there is no tokenizer folder {str(path)!r}; give the folder that holds tokenizer.model or tokenizer.json."
        )
    config = _read_json(folder / "tokenizer_config.json")
    options: dict[str, Any] = {"padding_side": padding_side}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    load = _choose_loader(folder, config)
    try:
        return load(str(folder), **options)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        ours = _input_error_behind(error)
        if ours is not None:
            raise ours from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {reason[0]}; fetch its files again.") from error


def _input_error_behind(error: BaseException | None) -> InputError | None:
    """Our own sentence, where loading by transformers turned it into another error."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return error


def _choose_loader(folder: Path, config: dict[str, Any]) -> Any:
    if (folder / "tokenizer.model").is_file() and config.get("tokenizer_class") in _LLAMA_CLASSES:
        return LlamaSentencePieceTokenizer.from_pretrained
    if (folder / "tokenizer.json").is_file():
        return _load_tokenizer_json
    if any((folder / name).is_file() for name in _OTHER_FILES):
        return _load_by_transformers
    raise InputError(
        f"{folder} holds no tokenizer: none of tokenizer.model, tokenizer.json, vocab.json is there; copy these files "
        "from the language model that it was made from, or name that model as the base."
    )


def _load_tokenizer_json(folder: str, **options: Any) -> Any:
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    # A file that asks for its spaces to be cleaned up gets what it asks for: its outputs have always looked that way.
    if _read_json(Path(folder) / "tokenizer_config.json").get("clean_up_tokenization_spaces"):
        options["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    return PreTrainedTokenizerFast.from_pretrained(folder, **options)


def _load_by_transformers(folder: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **options)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__} where a JSON object is expected; fetch the file again."
        )
    return content


# Prompts with image marks


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> Any:
    """Ids of a prompt, with `image_token_index` for every `<image>`: a list, or a tensor if return_tensors is "pt"."""
    ids_of = getattr(tokenizer, "ids_of", lambda text: list(tokenizer(text).input_ids))
    chunks = [ids_of(chunk) for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
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


def encode_with_places(
    text: str, tokenizer: Any, image_token_index: int | None = IMAGE_TOKEN_INDEX
) -> tuple[list[int], list[int]]:
    """The ids of `tokenizer_image_token` and, for each, the place in the text that decides whose token it is.

    That place is a token's last character; for a token without text of its own (an added space), the character after
    it; for an image, the last character of its mark; -1 for tokens that open or close the sequence. Where
    image_token_index is None, `<image>` is text like any other.
    """
    parts = [text] if image_token_index is None else text.split(DEFAULT_IMAGE_TOKEN)
    encoded = [_encode_part(part, tokenizer) for part in parts]
    skip = _num_repeated([ids for ids, _ in encoded], tokenizer)
    all_ids: list[int] = []
    all_places: list[int] = []
    start = 0
    for index, (part, (ids, places)) in enumerate(zip(parts, encoded, strict=True)):
        if index and image_token_index is not None:
            all_ids.append(image_token_index)
            all_places.append(start + len(DEFAULT_IMAGE_TOKEN) - 1)
            start += len(DEFAULT_IMAGE_TOKEN)
        first = skip if index else 0
        all_ids += ids[first:]
        all_places += [place if place < 0 else start + place for place in places[first:]]
        start += len(part)
    return all_ids, all_places


def _num_repeated(chunks: list[list[int]], tokenizer: Any) -> int:
    """1 where the tokenizer opens every chunk with its begin token, which only the first may keep."""
    return int(all(chunk[:1] == [tokenizer.bos_token_id] for chunk in chunks))


def _encode_part(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    if hasattr(tokenizer, "pieces"):
        pieces = tokenizer.pieces(text)
        inner = tokenizer.convert_tokens_to_ids([token for token, _, _ in pieces])
        ids = tokenizer.build_inputs_with_special_tokens(inner)
        before, after = int(tokenizer.add_bos_token), int(tokenizer.add_eos_token)
        return ids, [-1] * before + [_place(start, end) for _, start, end in pieces] + [-1] * after
    if not tokenizer.is_fast:
        raise InputError(
            f"a tokenizer of class {type(tokenizer).__name__} does not say where its tokens lie in the text, which "
            "labels need; use one with a tokenizer.json."
        )
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    marks = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return list(encoded["input_ids"]), [-1 if added else _place(*span) for span, added in marks]


def _place(start: int, end: int) -> int:
    return end - 1 if end > start else start
