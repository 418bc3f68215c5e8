"""The public names of the original's modules: each is there and does what it did, or docs/differences.md says what to use."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from eval_kit import png, rows_of, write_lines
from golden_data import golden
from repository import ROOT

from llava.errors import InputError, MissingPackageError
from llava.text.tokenization import load_tokenizer

# Names that are imported from each module of the original, version 1.2.2.post1.
THERE = {
    "llava.constants": "CONTROLLER_HEART_BEAT_EXPIRATION WORKER_HEART_BEAT_INTERVAL LOGDIR IGNORE_INDEX IMAGE_TOKEN_INDEX "
    "DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN IMAGE_PLACEHOLDER",
    "llava.conversation": "SeparatorStyle Conversation conv_vicuna_v0 conv_vicuna_v1 conv_llama_2 conv_llava_llama_2 conv_mpt "
    "conv_llava_plain conv_llava_v0 conv_llava_v0_mmtag conv_llava_v1 conv_llava_v1_mmtag conv_mistral_instruct "
    "conv_chatml_direct default_conversation conv_templates",
    "llava.mm_utils": "select_best_resolution resize_and_pad_image divide_to_patches get_anyres_image_grid_shape "
    "process_anyres_image load_image_from_base64 expand2square process_images tokenizer_image_token "
    "get_model_name_from_path KeywordsStoppingCriteria",
    "llava.utils": "server_error_msg moderation_msg build_logger StreamToLogger disable_torch_init violates_moderation "
    "pretty_print_semaphore rank0_print",
    "llava.model": "LlavaLlamaForCausalLM LlavaConfig LlavaMptForCausalLM LlavaMptConfig LlavaMistralForCausalLM "
    "LlavaMistralConfig",
    "llava.model.apply_delta": "apply_delta",
    "llava.model.consolidate": "consolidate_ckpt",
    "llava.model.make_delta": "make_delta",
    "llava.model.utils": "auto_upgrade",
    "llava.model.builder": "load_pretrained_model",
    "llava.model.llava_arch": "LlavaMetaModel unpad_image LlavaMetaForCausalLM",
    "llava.model.language_model.llava_llama": "LlavaConfig LlavaLlamaModel LlavaLlamaForCausalLM",
    "llava.model.language_model.llava_mistral": "LlavaMistralConfig LlavaMistralModel LlavaMistralForCausalLM",
    "llava.model.language_model.llava_mpt": "LlavaMptConfig LlavaMptModel LlavaMptForCausalLM",
    "llava.model.multimodal_encoder.builder": "build_vision_tower",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTower CLIPVisionTowerS2",
    "llava.model.multimodal_projector.builder": "IdentityMap SimpleResBlock build_vision_projector",
    "llava.serve.cli": "load_image main",
    "llava.serve.test_message": "main",
    "llava.train.train_mem": "train",
    "llava.train.train_xformers": "train",
    "llava.train.llava_trainer": "maybe_zero_3 get_mm_adapter_state_maybe_zero_3 split_to_even_chunks "
    "get_modality_length_grouped_indices get_length_grouped_indices LengthGroupedSampler LLaVATrainer",
    "llava.train.train": "rank0_print ModelArguments DataArguments TrainingArguments maybe_zero_3 "
    "get_peft_state_maybe_zero_3 get_peft_state_non_lora_maybe_zero_3 get_mm_adapter_state_maybe_zero_3 "
    "find_all_linear_names safe_save_model_for_hf_trainer smart_tokenizer_and_embedding_resize _tokenize_fn _mask_targets "
    "_add_speaker_and_signal preprocess_multimodal preprocess_llama_2 preprocess_v1 preprocess_mpt preprocess_plain "
    "preprocess LazySupervisedDataset DataCollatorForSupervisedDataset make_supervised_data_module train",
    "llava.eval.eval_gpt_review": "get_eval parse_score",
    "llava.eval.eval_gpt_review_bench": "get_eval parse_score",
    "llava.eval.eval_gpt_review_visual": "get_eval parse_score",
    "llava.eval.eval_pope": "eval_pope",
    "llava.eval.eval_science_qa": "convert_caps get_pred_idx",
    "llava.eval.eval_science_qa_gpt4": "convert_caps get_pred_idx",
    "llava.eval.eval_science_qa_gpt4_requery": "convert_caps get_pred_idx",
    "llava.eval.eval_textvqa": "prompt_processor eval_single",
    "llava.eval.m4c_evaluator": "EvalAIAnswerProcessor TextVQAAccuracyEvaluator STVQAAccuracyEvaluator STVQAANLSEvaluator "
    "TextCapsBleu4Evaluator",
    "llava.eval.model_qa": "eval_model",
    "llava.eval.model_vqa": "split_list get_chunk eval_model",
    "llava.eval.model_vqa_loader": "split_list get_chunk eval_model",
    "llava.eval.model_vqa_mmbench": "all_options split_list get_chunk is_none get_options eval_model",
    "llava.eval.model_vqa_qbench": "load_image eval_model",
    "llava.eval.model_vqa_science": "split_list get_chunk eval_model",
    "llava.eval.run_llava": "image_parser load_image load_images eval_model",
}
# Names that it had, for which docs/differences.md says what to use.
GONE = {
    "llava.utils": "handler",
    "llava.serve.controller": "DispatchMethod WorkerInfo heart_beat_controller Controller app register_worker "
    "refresh_all_workers list_models get_worker_address receive_heart_beat worker_api_generate_stream worker_api_get_status",
    "llava.serve.gradio_web_server": "logger headers no_change_btn enable_btn disable_btn priority get_conv_log_filename "
    "get_model_list get_window_url_params load_demo load_demo_refresh_model_list vote_last_response upvote_last_response "
    "downvote_last_response flag_last_response regenerate clear_history add_text http_bot title_markdown tos_markdown "
    "learn_more_markdown block_css build_demo",
    "llava.serve.model_worker": "GB worker_id logger global_counter model_semaphore heart_beat_worker ModelWorker app "
    "release_model_semaphore generate_stream get_status",
    "llava.serve.sglang_worker": "pipeline",
    "llava.train.llama_flash_attn_monkey_patch": "forward replace_llama_attn_with_flash_attn",
    "llava.train.llama_xformers_attn_monkey_patch": "replace_llama_attn_with_xformers_attn xformers_forward",
    "llava.train.train": "local_rank IS_TOKENIZER_GREATER_THAN_0_14",
    "llava.eval.eval_gpt_review": "NUM_SECONDS_TO_SLEEP",
    "llava.eval.eval_science_qa": "get_args",
    "llava.eval.eval_textvqa": "get_args",
    "llava.eval.summarize_gpt_review": "parse_args",
    "llava.eval.qa_baseline_gpt35": "MODEL MODEL_ID get_answer",
    "llava.eval.model_vqa_loader": "CustomDataset collate_fn create_data_loader",
    "llava.eval.generate_webpage_data_from_table": "read_jsonl trim_hanging_lines",
}


@pytest.mark.parametrize("module", THERE)
def test_names_are_there(module: str) -> None:
    found = import_module(module)
    assert [name for name in THERE[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("page", ["docs/differences.md", "docs/differences.zh-CN.md"])
def test_names_that_are_not_here_are_listed(page: str) -> None:
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| `llava.")]
    for module, names in GONE.items():
        listed = "".join(row for row in rows if f"`{module}`" in row.split(" | ")[0])
        assert [name for name in names.split() if f"`{name}`" not in listed] == [], module


# What they do. Names that this package's own programs use are tested with those.


def test_templates_are_the_table_s() -> None:
    from llava import conversation

    for name, entry in (
        ("conv_vicuna_v1", "vicuna_v1"),
        ("conv_llava_plain", "plain"),
        ("conv_llava_v1_mmtag", "v1_mmtag"),
    ):
        assert getattr(conversation, name) is conversation.conv_templates[entry]


def test_unpad_image() -> None:
    from llava.model.llava_arch import unpad_image

    for (rows, cols), size, shape, ends in json.loads(golden("images/unpad_image.json").read_text()):
        grid = torch.arange(rows * cols).reshape(1, rows, cols)
        kept = unpad_image(grid, size)
        assert list(kept.shape[1:]) == shape
        if ends is not None:
            assert [int(kept.flatten()[0]), int(kept.flatten()[-1])] == ends


def test_residual_block() -> None:
    from llava.model.multimodal_projector.builder import SimpleResBlock

    torch.manual_seed(0)
    block, x = SimpleResBlock(6), torch.randn(3, 6)
    assert list(block.state_dict()) == [
        "pre_norm.weight", "pre_norm.bias", "proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias"
    ]  # fmt: skip
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    inner = normal @ block.proj[0].weight.T + block.proj[0].bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    assert torch.allclose(block(x), normal + gelu @ block.proj[2].weight.T + block.proj[2].bias, atol=1e-6)


def test_stream_to_logger(caplog: pytest.LogCaptureFixture) -> None:
    from llava.utils import StreamToLogger, pretty_print_semaphore

    stream = StreamToLogger(logging.getLogger("stream"), logging.WARNING)
    print("one\ntw", end="", file=stream)
    print("o  \nthree", end="", file=stream)
    assert caplog.messages == ["one", "two"]
    stream.flush()
    stream.flush()
    assert caplog.messages == ["one", "two", "three"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert stream.fileno == sys.stdout.fileno
    assert pretty_print_semaphore(None) == "None"
    assert pretty_print_semaphore(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"


@pytest.fixture
def service() -> Iterator[tuple[str, list[Any], list[Any]]]:
    """A server that keeps the bodies it gets and answers with the replies it was given; a reply of None is status 500."""
    bodies: list[Any] = []
    replies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies.pop(0)
            self.send_response(500 if reply is None else 302 if reply == "moved" else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/moved")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def do_GET(self) -> None:
            bodies.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", bodies, replies
    server.shutdown()
    server.server_close()


def test_moderation(service: tuple[str, list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from llava import utils

    url, bodies, replies = service
    monkeypatch.setattr(utils, "MODERATION_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    replies += [{"results": [{"flagged": True}]}, {"results": [{"flagged": False}]}, {"error": "no"}, None]
    text = 'with "quotes"\nand lines'
    assert [utils.violates_moderation(text) for _ in range(4)] == [True, False, False, False]
    assert bodies[0] == {"input": text}
    replies.append("moved")
    assert not utils.violates_moderation(text)
    assert all(isinstance(body, dict) for body in bodies), "the key followed a redirect"


def test_get_eval_asks_the_judge(service: tuple[str, list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval.eval_gpt_review_bench import get_eval, parse_score

    url, bodies, replies = service
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    replies.append({"choices": [{"message": {"content": "8 7.5\nbecause"}}]})
    review = get_eval("compare these", 50)
    assert parse_score(review) == [8.0, 7.5]
    assert bodies[0]["messages"][-1] == {"role": "user", "content": "compare these"}
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"]) == (50, 0.2)
    assert [parse_score(text) for text in ("8,7", "8", "eight 7", "")] == [[8.0, 7.0], *[[-1.0, -1.0]] * 3]


def test_steps_of_the_first_generation() -> None:
    from llava import conversation
    from llava.train.train import _add_speaker_and_signal, _mask_targets, _tokenize_fn

    tokenizer = load_tokenizer(golden("tokenizers/llama-mini1k-legacy"))
    tokenizer.pad_token = tokenizer.unk_token
    conv = conversation.conv_templates["v0"]
    source = [
        {"from": "human", "value": "What is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "x", "value": "?"},
    ]
    spoken = [dict(turn) for turn in source]
    header = f"{conv.system}\n\n"
    text = _add_speaker_and_signal(header, spoken)
    names = conversation.default_conversation.roles
    assert text == f"{header}### {names[0]}: What is it?\n### {names[1]}: A cat.\n### unknown: ?\n### "
    assert spoken[1]["value"] == f"### {names[1]}: A cat.\n"
    assert _add_speaker_and_signal("h", [dict(turn) for turn in source], get_conversation=False) == "h### "

    encoded = _tokenize_fn([header, *[turn["value"] for turn in spoken]], tokenizer)
    assert [row.tolist() for row in encoded["input_ids"]] == [
        tokenizer(text).input_ids for text in [header, *[turn["value"] for turn in spoken]]
    ]
    assert encoded["input_ids_lens"] == [len(row) for row in encoded["labels"]]
    whole = torch.tensor(tokenizer(text).input_ids)
    labels = whole.clone()
    lengths = [int(n) for n in encoded["input_ids_lens"]]
    _mask_targets(labels, lengths, [turn["from"] for turn in source])
    first, second = lengths[0], lengths[0] + lengths[1]
    expected = whole.clone()
    expected[:first] = -100
    expected[first + 2 : second] = -100
    assert torch.equal(labels, expected)
    limited = _tokenize_fn(["many words of a text that is cut"], tokenizer)
    tokenizer.model_max_length = 4
    assert torch.equal(
        _tokenize_fn(["many words of a text that is cut"], tokenizer)["input_ids"][0], limited["input_ids"][0][:4]
    )


def test_pope_of_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava.eval.eval_pope import eval_pope

    truths = ["yes", "yes", "no", "no", "yes"]
    texts = ["Yes.", "No", "no, nothing", "Yes", "There is a cat."]
    labels = write_lines(tmp_path / "coco_pope_random.json", [{"label": truth} for truth in truths])
    eval_pope([{"text": text} for text in texts], labels)
    assert capsys.readouterr().out.splitlines()[1] == "2\t1\t1\t1"
    precision = recall = f1 = 2 / 3
    write_lines(labels, [{"label": truth} for truth in truths])
    eval_pope([{"text": text} for text in texts], str(labels))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"{f1:.3f}, 0.600, {precision:.3f}, {recall:.3f}, 0.600"
    with pytest.raises(InputError, match="5 labels for 1 answers"):
        eval_pope([{"text": "yes"}], labels)


def test_science_qa_letters() -> None:
    from llava.eval.eval_science_qa import convert_caps, get_pred_idx

    options = ["A", "B", "C", "D", "E"]
    assert [get_pred_idx(letter, ["x", "y", "z"], options) for letter in ("A", "C", "D", "FAILED")] == [0, 2, -1, -1]
    assert convert_caps([{"question_id": "7", "text": "a dog"}]) == [{"image_id": 7, "caption": "a dog"}]


def test_text_vqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava.eval.eval_textvqa import eval_single, prompt_processor

    assert prompt_processor("What Brand?\nReference OCR token: A\nAnswer briefly.") == "what brand?"
    assert prompt_processor("OCR tokens: a. Question: Who? Short answer:") == "who?"
    with pytest.raises(InputError, match="TextVQA"):
        prompt_processor("one line")
    people = ["red"] * 4 + ["blue"] * 6
    data = {"data": [{"image_id": "i", "question": "Colour?", "answers": people}]}
    (tmp_path / "ann.json").write_text(json.dumps(data))
    row = {"question_id": "i", "prompt": "colour?\nAnswer.", "text": "red"}
    eval_single(str(tmp_path / "ann.json"), str(write_lines(tmp_path / "run.jsonl", [row])))
    # Of ten people, each left out once: where 4 of 10 said it, the mean of min(1, number of the other nine / 3) is 1.
    assert capsys.readouterr().out.splitlines()[:3] == ["run", "Samples: 1", "Accuracy: 100.00%"]


def test_mmbench_options() -> None:
    from llava.eval.model_vqa_mmbench import all_options, get_options, is_none

    assert all_options == ["A", "B", "C", "D"]
    row = {"A": "one", "B": "two", "C": float("nan"), "D": "four"}
    assert get_options(row, all_options) == ["one", "two"]
    assert get_options({"A": None}, all_options) == []
    assert [is_none(value) for value in (None, float("nan"), "NaN", "None", "0", "x")] == [True] * 4 + [False] * 2


def test_bleu_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own classes are called as they want to be."""
    from llava.eval.m4c_evaluator import TextCapsBleu4Evaluator

    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(MissingPackageError, match="pip install pycocoevalcap"):
        TextCapsBleu4Evaluator()
    calls = []

    class Tokenizer:
        def tokenize(self, captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
            return {number: [row["caption"].lower() for row in rows] for number, rows in captions.items()}

    class Bleu:
        def __init__(self, order: int) -> None:
            self.order = order

        def compute_score(self, gts: dict[int, list[str]], res: dict[int, list[str]]) -> tuple[list[float], None]:
            calls.append((self.order, gts, res))
            return [0.1, 0.2, 0.3, 0.4], None

    modules = {"pycocoevalcap": {}, "pycocoevalcap.bleu": {}, "pycocoevalcap.tokenizer": {}}
    modules |= {"pycocoevalcap.bleu.bleu": {"Bleu": Bleu}}
    modules |= {"pycocoevalcap.tokenizer.ptbtokenizer": {"PTBTokenizer": Tokenizer}}
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert TextCapsBleu4Evaluator().eval_pred_list([{"pred_answer": "A Dog", "gt_answers": ["a dog", "Dogs"]}]) == 0.4
    assert calls == [(4, {0: ["a dog", "dogs"]}, {0: ["a dog"]})]


@pytest.mark.parametrize("program", ["model_vqa", "model_vqa_loader", "model_vqa_science"])
def test_eval_model_of_the_programs(program: str, tmp_path: Path) -> None:
    """Called as outside code does: with an object that has the original's flags, and with one that has few of them."""
    model = tiny.build(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(png())
    if program == "model_vqa_science":
        rows = [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}]
        questions = tmp_path / "q.json"
        questions.write_text(json.dumps(rows))
    else:
        questions = write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "image": "a.png", "text": "What?"}])
    eval_model = import_module(f"llava.eval.{program}").eval_model
    few = {"model_path": str(model), "image_folder": str(tmp_path), "question_file": str(questions)}
    few |= {"answers_file": str(tmp_path / "few.jsonl"), "temperature": 0, "conv_mode": "vicuna_v1"}
    eval_model(type("Args", (), few))
    many = {**few, "answers_file": str(tmp_path / "many.jsonl"), "model_base": None, "num_chunks": 1, "chunk_idx": 0}
    eval_model(SimpleNamespace(**many, top_p=None, num_beams=1, max_new_tokens=128))
    answers = [rows_of(tmp_path / name) for name in ("few.jsonl", "many.jsonl")]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1


def test_eval_model_of_the_text_program(tmp_path: Path) -> None:
    from llava.eval.model_qa import eval_model

    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": 3, "text": "Hello?", "category": "generic"}])
    eval_model(str(golden("checkpoints/vicuna-tiny-base")), str(questions), str(tmp_path / "a.jsonl"))
    assert [row["question_id"] for row in rows_of(tmp_path / "a.jsonl")] == [3]


def test_eval_model_names_what_is_absent(tmp_path: Path) -> None:
    from llava.eval.common_flags import EvalScript, ScriptFlag

    seen = []
    script = EvalScript(
        "p.py", "", (ScriptFlag("--in-file", "the input", required=True), ScriptFlag("--n", "", 3)), seen.append
    )
    script.call(SimpleNamespace(in_file="x", other=1))
    assert vars(seen[0]) == {"in_file": "x", "n": 3}
    with pytest.raises(InputError, match=r"p\.py have no 'in_file'"):
        script.call(SimpleNamespace(n=1))


def test_auto_classes_know_the_published_types(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import llava.model.builder  # noqa: F401  # registers them

    for language_model, name in (
        ("llama", "LlavaConfig"),
        ("mistral", "LlavaMistralConfig"),
        ("qwen2", "LlavaQwenConfig"),
    ):
        folder = tiny.build(tmp_path / language_model, language_model)
        config = AutoConfig.from_pretrained(folder)
        assert type(config).__name__ == name
        assert config.mm_hidden_size == 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
