"""The sentencepiece tokenizer and `<image>` prompts against recordings; saving, copying, padding, streaming, bad files."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from golden_data import fullest, golden, require_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import InputError
from llava.text.detokenizer import stream_decoder
from llava.text.tokenization import (
    LlamaSentencePieceTokenizer,
    encode_with_offsets,
    load_tokenizer,
    tokenizer_image_token,
)

RECORD = json.loads(fullest("tokenize_image_token.json").read_text(encoding="utf-8"))
# Recordings of a fast conversion are left out: nothing here loads `tokenizer.model` that way.
TOKENIZERS = [name for name in RECORD["tokenizers"] if not name.endswith("+fast")]
MINI = ("llama-mini1k-legacy", "llama-mini1k-nonlegacy")
# Spaces, special tokens, characters without a piece, and pieces that merge across them.
TEXTS = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "a", "the", "ASSISTANT:", "</s>", "<s>", "é", "日本", "▁", "1", ".", "\t", "<image>"]
    ),
    max_size=12,
).map("".join)


def load(name: str):
    record = RECORD["tokenizers"][name]
    tokenizer = load_tokenizer(require_golden(f"tokenizers/{record['dir']}"))
    tokenizer.add_tokens(list(record.get("added_special_tokens", {})), special_tokens=True)
    return tokenizer


def _tokenizer_with_added_tokens(name):
    tokenizer = load(name)
    tokenizer.add_tokens(["<im_start>"], special_tokens=True)
    tokenizer.add_tokens(["[word]", " [spaced] ", "é"])
    return tokenizer


WITH_ADDED = {name: _tokenizer_with_added_tokens(name) for name in MINI}


@pytest.fixture(params=MINI)
def mini(request):
    return load(request.param)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_vocabulary_and_special_tokens(name):
    tokenizer, record = load(name), RECORD["tokenizers"][name]
    assert len(tokenizer) == record["len"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        record["bos"],
        record["eos"],
        record["unk"],
    )
    assert tokenizer.pad_token_id == record["pad"]
    assert sorted(set(tokenizer.all_special_tokens)) == sorted(record["special"])
    for token, index in record.get("added_special_tokens", {}).items():
        assert tokenizer.convert_tokens_to_ids(token) == index


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_texts_are_the_recorded_ones(name):
    tokenizer = load(name)
    rows = RECORD["tokenizers"][name]["rows"]
    for prompt, row in zip(RECORD["prompts"], rows, strict=True):
        ids = tokenizer(prompt).input_ids
        assert tokenizer_image_token(prompt, tokenizer) == row["ids"], prompt
        assert ids == row["plain_ids"], prompt
        assert tokenizer.decode(ids) == row["decode"], prompt
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["decode_skip_special"], prompt
        assert tokenizer.batch_decode([ids[1:]], skip_special_tokens=True) == [row["batch_decode_no_bos_strip"]], prompt


CLASSES = json.loads(golden("tokenizer_classes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CLASSES["folders"])
def test_folders_that_a_fast_class_saved(name, tmp_path):
    """A tokenizer.json beside the model file: which of them counts, and how text is decoded, as the original has it."""
    shutil.copytree(golden("tokenizers/llama-mini1k-fast"), tmp_path, dirs_exist_ok=True)
    shutil.copy(golden("tokenizers/llama-mini1k-legacy/tokenizer.model"), tmp_path)
    record, file = CLASSES["folders"][name], tmp_path / "tokenizer_config.json"
    if record["edit"] is None:
        file.unlink()
    else:
        values = json.loads(file.read_text(encoding="utf-8")) | record["edit"]
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast == record["class"].endswith("Fast")
    for prompt, row in zip(CLASSES["prompts"], record["rows"], strict=True):
        ids = tokenizer(prompt).input_ids
        assert ids == row["ids"], prompt
        assert encode_with_offsets(prompt, tokenizer, None)[0] == ids
        assert tokenizer.decode(ids) == row["decode"], prompt
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["skip"], prompt
        assert tokenizer.decode(ids[1:]) == row["tail"], prompt
        decoder = stream_decoder(tokenizer)
        assert "".join([*[decoder.push([token]) for token in ids], decoder.finish()]) == row["skip"], prompt


def test_return_tensors(mini):
    prompt = "a<image>b"
    tensor = tokenizer_image_token(prompt, mini, return_tensors="pt")
    assert (str(tensor.dtype), list(tensor.shape)) == tuple(RECORD["return_tensors_pt"].values())
    assert tokenizer_image_token(prompt, mini, image_token_index=-7) == [
        -7 if token == -200 else token for token in tokenizer_image_token(prompt, mini)
    ]
    with pytest.raises(ValueError, match="Unsupported tensor type: np"):
        tokenizer_image_token(prompt, mini, return_tensors="np")


@pytest.mark.parametrize("name", [*MINI, "neox2k-chatml"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_offsets_point_at_the_text_of_each_token(name, text):
    tokenizer = load(name)
    ids, offsets = encode_with_offsets(text, tokenizer)
    assert ids == tokenizer_image_token(text, tokenizer)
    assert encode_with_offsets(text, tokenizer, None)[0] == tokenizer(text).input_ids
    inner = [offset for offset in offsets if offset >= 0]
    assert inner == sorted(inner)
    assert all(offset <= len(text) for offset in inner)
    # Cutting the text after a token's offset and decoding the ids up to there gives that part of the text again.
    for token, offset in zip(ids, offsets, strict=True):
        if token == -200:
            assert text[: offset + 1].endswith("<image>")
        elif token in tokenizer.all_special_ids and offset >= 0 and "llama" in name:
            assert text[: offset + 1].endswith(tokenizer.convert_ids_to_tokens(token))


@pytest.mark.parametrize("name", MINI)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_cover_the_text_in_order(name, text):
    tokenizer = load(name)
    pieces = tokenizer.pieces(text)
    covered = 0
    for piece in pieces:
        # Bytes of one character share it; any other piece starts where the one before it ended.
        assert piece.start in (covered, covered - 1)
        covered = piece.end
        plain = piece.token.replace("▁", " ")
        if piece.token.startswith("<0x") or piece.token in ("<s>", "</s>"):
            continue
        stretch = text[piece.start : piece.end].replace("▁", " ")
        assert plain in (stretch, f" {stretch}")  # an added space is part of a piece, or one of its own
    assert covered == len(text)


def test_pickles_and_copies_encode_alike(mini):
    mini.add_tokens(["<im_start>"], special_tokens=True)
    text = "héllo <im_start> </s> 日本"
    for twin in (pickle.loads(pickle.dumps(mini)), copy.deepcopy(mini)):
        assert twin(text).input_ids == mini(text).input_ids
        assert twin.decode(twin(text).input_ids) == mini.decode(mini(text).input_ids)
        assert len(twin) == len(mini)


def test_saving_and_loading_is_exact(mini, tmp_path):
    mini.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    mini.add_tokens(["[word]"])
    mini.pad_token = mini.unk_token
    mini.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"} <= written
    again = load_tokenizer(tmp_path)
    assert (again.legacy, again.pad_token, again.model_max_length) == (
        mini.legacy,
        mini.pad_token,
        mini.model_max_length,
    )
    assert again.get_vocab() == mini.get_vocab()
    for text in [*RECORD["prompts"], "<im_start>[word] x<im_end>"]:
        ids = mini(text).input_ids
        assert again(text).input_ids == ids
        assert again.decode(ids) == mini.decode(ids)
        assert again.decode(ids, skip_special_tokens=True) == mini.decode(ids, skip_special_tokens=True)


def test_bos_setting_survives_saving(mini, tmp_path):
    mini.add_bos_token = False
    mini.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("hello").input_ids == mini("hello").input_ids
    assert again.bos_token_id not in again("hello").input_ids


def test_stock_transformers_reads_what_is_saved(mini, tmp_path):
    from transformers import AutoTokenizer

    mini.add_tokens(["<im_start>"], special_tokens=True)
    mini.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert len(stock) == len(mini)
    assert stock("hello there<im_start>").input_ids == mini("hello there<im_start>").input_ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["add_bos_token"] is True
    assert config["legacy"] is mini.legacy


def test_model_file_alone_is_enough(tmp_path):
    shutil.copy(golden(f"tokenizers/{MINI[0]}/tokenizer.model"), tmp_path)
    alone, with_config = load_tokenizer(tmp_path), load(MINI[0])
    for prompt in RECORD["prompts"]:
        assert alone(prompt).input_ids == with_config(prompt).input_ids


def test_model_file_wins_over_its_conversion(tmp_path):
    shutil.copytree(golden(f"tokenizers/{MINI[0]}"), tmp_path, dirs_exist_ok=True)
    shutil.copy(golden("tokenizers/neox2k-plain/tokenizer.json"), tmp_path)
    assert isinstance(load_tokenizer(tmp_path), LlamaSentencePieceTokenizer)


def test_options_of_loading(mini, tmp_path):
    folder = golden(f"tokenizers/{MINI[0]}")
    tokenizer = load_tokenizer(folder, model_max_length=123, padding_side="left")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (123, "left")
    assert mini.model_max_length == 2048


def test_batches_are_padded_and_cut(mini):
    mini.pad_token = mini.unk_token
    alone = [mini(text).input_ids for text in ("a", "hello there")]
    width = len(alone[1])
    batch = mini(["a", "hello there"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [alone[0] + [0] * (width - len(alone[0])), alone[1]]
    assert batch.attention_mask.sum(1).tolist() == [len(alone[0]), width]
    left = mini(["a", "hello there"], padding=True, padding_side="left").input_ids
    assert left[0] == [0] * (width - len(alone[0])) + alone[0]
    assert mini("hello there", truncation=True, max_length=3).input_ids == alone[1][:3]


def test_streamers_of_transformers_take_it(mini):
    from transformers import TextIteratorStreamer

    ids = mini("日本 héllo   world\nnew line\nend.").input_ids
    streamer = TextIteratorStreamer(mini, skip_special_tokens=True)
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer) == mini.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", [*MINI, "neox2k-chatml"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, indented=st.booleans())
def test_streamed_parts_join_to_the_decoded_text(name, text, indented):
    tokenizer = load(name)
    ids = tokenizer(text + "\n    x = 1\n" * indented).input_ids
    decoder = stream_decoder(tokenizer)
    parts = [decoder.push([token]) for token in ids] + [decoder.finish()]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(parts) == whole
    if len(ids) > 20:
        assert sum(map(bool, parts)) > 5  # it does come in parts


@pytest.mark.parametrize("name", MINI)
@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<im_start>", "[word]", " [spaced] ", "é", "<unk>", "ø", "\u3042", ""]), max_size=5
    ),
    text=TEXTS,
)
def test_ids_alone_are_those_of_a_call(name, parts, text):
    tokenizer = WITH_ADDED[name]
    text = text.join(parts)
    assert tokenizer.encode_ids(text) == tokenizer(text).input_ids
    ids, _ = encode_with_offsets(text, tokenizer)
    assert tokenizer_image_token(text, tokenizer) == ids


IDS = st.lists(
    st.one_of(
        st.integers(0, len(WITH_ADDED[MINI[0]]) - 1),
        st.integers(0, 2),  # special
        st.integers(len(WITH_ADDED[MINI[0]]) - 4, len(WITH_ADDED[MINI[0]]) - 1),  # added
        st.sampled_from(WITH_ADDED[MINI[0]].convert_tokens_to_ids(["▁", "▁▁", "▁▁▁▁", "▁a", "a", "\n"])),
        # Bytes of ñ, of 日, of 🦙, of U+FFFD, and some that are none of a character.
        st.sampled_from([3 + byte for byte in b"\xc3\xb1\xe6\x97\xa5\xf0\x9f\xa6\x99\xef\xbf\xbd\xff\xed\xa0\x80 a"]),
    ),
    max_size=14,
)


@pytest.mark.parametrize("name", MINI)
@settings(max_examples=600, deadline=None)
@given(ids=IDS, cuts=st.lists(st.integers(0, 14), max_size=14))
def test_any_ids_in_any_parts_join_to_the_decoded_text(name, ids, cuts):
    tokenizer = WITH_ADDED[name]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for ends in ([*sorted(cuts), len(ids)], range(1, len(ids) + 1)):
        decoder = stream_decoder(tokenizer)
        parts = [decoder.push(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        assert not any(part.endswith("\ufffd") for part in parts)
        assert "".join([*parts, decoder.finish()]) == whole


def test_every_token_of_a_vocabulary_in_a_row(mini):
    ids = [*range(len(mini)), *reversed(range(len(mini)))]
    decoder = stream_decoder(mini)
    parts = [decoder.push([token]) for token in ids]
    assert "".join([*parts, decoder.finish()]) == mini.decode(ids, skip_special_tokens=True)


def test_tokens_that_become_special_or_added_later_are_decoded_as_such(mini):
    letter = mini.convert_tokens_to_ids("a")
    assert stream_decoder(mini).push([letter, letter]) == "aa"
    mini.add_tokens(["[word]"])
    assert stream_decoder(mini).push([letter, len(mini) - 1, letter]) == "a [word] a"
    mini.pad_token = "a"
    assert stream_decoder(mini).push([letter, len(mini) - 1, letter]) == "[word]"


def test_half_a_character_is_held_back_until_the_end(mini):
    ids = mini("日").input_ids[1:]
    decoder = stream_decoder(mini)
    assert [decoder.push([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.push(ids[-1:]) == "日"
    decoder.push(ids[:-1])
    assert "\ufffd" in decoder.finish()


def test_ends_of_sequences_can_be_asked_for(mini):
    mini.add_eos_token = True
    ids, offsets = encode_with_offsets("hello", mini)
    assert (ids[0], ids[-1], offsets[0], offsets[-1]) == (1, 2, -1, -1)
    assert mini.get_special_tokens_mask(ids[1:-1]) == [1, *[0] * (len(ids) - 2), 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "is empty"),
        (
            lambda folder: (folder / "tokenizer.model").write_text("version https://git-lfs"),
            "not a sentencepiece model",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}'),
            "holds no",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tok'),
            "tokenizer_config.json is not valid JSON",
        ),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_bad_folders_are_answered_by_one_sentence(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_other_bad_input():
    with pytest.raises(InputError, match="no tokenizer folder 'nowhere'"):
        load_tokenizer("nowhere")
    tokenizer = load(MINI[0])
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer("a \ud83d b")
    with pytest.raises(InputError, match="token id 5000 is outside"):
        tokenizer.decode([5000])


def test_loading_and_encoding_need_no_torch():
    code = (
        "import sys; from llava.text.tokenization import load_tokenizer, tokenizer_image_token;"
        f"t = load_tokenizer({str(golden(f'tokenizers/{MINI[0]}'))!r}); print(tokenizer_image_token('a<image>b', t));"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[:2] == ["[1, 260, -200, 280]", "False"]
