"""The chat template of a model folder: named where a template of this package is equal, else the conversation itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cli_kit import run_llava
from tiny import build, save_tokenizer
from transformers import AutoTokenizer

from llava import load
from llava.chat_template import MAX_TEMPLATE_CHARS, find_chat_template
from llava.conversation import answer_end, conv_templates, get_template
from llava.convert.describe import describe_checkpoint
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.model.template_defaults import TemplateChoice, choose_template
from llava.processor import Processor
from llava.serve.backends.base import ModelCard
from llava.serve.openai.routes import ModelApi
from llava.serve.web.client import PageClient
from llava.session import Session
from llava.text.labels import dialogue_spans, preprocess
from llava.text.tokenization import load_tokenizer

# As published folders have them.
BAKLLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA_3_PARTS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% for c in message['content'] %}{% if c['type']=='image' %}<image>{% else %}{{ '\\n' + c['text'] }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
LLAVA_HF = BAKLLAVA.replace("{{ content['text'] + ' '}}{% endfor %}{% endfor %}", (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' '}}{% endif %}{% endfor %}{% endfor %}"
))  # fmt: skip
OTHER_MARK = LLAMA_3_PARTS.replace("<image>", "<|start|><|img|>")
OWN = {
    "bakllava": (BAKLLAVA, "</s>"), "llava-1.5-hf": (LLAVA_HF, "</s>"), "llama-3 of parts": (LLAMA_3_PARTS, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
}  # fmt: skip
EQUAL = {"llama_3": LLAMA_3, "phi_3": PHI_3, "gemma_instruct": GEMMA, "qwen_1_5": QWEN}
DIALOGUE = ["<image>\nWhat?", "A red\n\ncube.", "Where, and why?", " Left {{ x }} "]


def folder_with(folder: Path, template: str, name: str = "chat_template.json", **config: object) -> Path:
    save_tokenizer(folder)
    if name == "chat_template.jinja":
        (folder / name).write_text(template, encoding="utf-8")
    elif name == "chat_template.json":
        (folder / name).write_text(json.dumps({"chat_template": template}))
    values = json.loads((folder / "tokenizer_config.json").read_text()) | config
    if name == "tokenizer_config.json":
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def chosen(folder: Path, model_type: str = "llama") -> TemplateChoice:
    config = {"model_type": "llava", "text_config": {"model_type": model_type}}
    return choose_template(config, "model", folder=folder, has_token=lambda text: False)


def theirs(folder: Path, texts: list[str], system: str | None = None, *, as_parts: bool, is_open: bool = True) -> str:
    """What transformers renders for the turns, an image being a part of its own where the template takes parts."""

    def content(text: str) -> object:
        if not as_parts:
            return text
        images = [{"type": "image"}] * text.count("<image>")
        return [*images, {"type": "text", "text": text.replace("<image>\n", "")}]

    messages = [] if system is None else [{"role": "system", "content": content(system)}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": content(text)} for i, text in enumerate(texts)]
    template = find_chat_template(folder)
    assert template is not None
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open, chat_template=template.source
    )


def ours(name: str, texts: list[str | None], system: str | None = None):
    conversation = get_template(name) if system is None else get_template(name).with_system(system)
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("case", OWN)
def test_prompts_are_those_of_transformers(tmp_path: Path, case: str, name: str) -> None:
    template, end = OWN[case]
    folder = folder_with(tmp_path, template, name)
    choice = chosen(folder)
    assert choice == (str(folder / name), "the folder's own chat template")
    as_parts = "content['text']" in template or "c['text']" in template
    cases = [(DIALOGUE[:1], None), (DIALOGUE[:3], None), (["No image?"], None), (DIALOGUE[:3], "Be brief.")]
    for texts, system in cases[:3] if case == "mistral" else cases:  # which drops system text
        prompt = theirs(folder, texts, system, as_parts=as_parts)
        assert ours(choice.name, [*texts, None], system).get_prompt() == prompt
    assert ours(choice.name, [*DIALOGUE]).get_prompt() == theirs(folder, DIALOGUE, as_parts=as_parts, is_open=False)
    assert answer_end(get_template(choice.name)) == end


@pytest.mark.parametrize("name", EQUAL)
def test_an_equal_template_of_this_package_is_named(tmp_path: Path, name: str) -> None:
    choice = chosen(folder_with(tmp_path, EQUAL[name]))
    assert choice == (name, "equal to the folder's chat template, chat_template.json")
    prompt = ours(name, [*DIALOGUE[:3], None]).get_prompt()
    assert theirs(tmp_path, DIALOGUE[:3], as_parts=False).removeprefix("<s>") == prompt


def test_a_begin_token_that_nobody_else_adds_is_not_lost(tmp_path: Path) -> None:
    """gemma_instruct leaves it to the tokenizer, and this tokenizer adds none."""
    folder = folder_with(tmp_path, GEMMA)
    values = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert chosen(folder).name == str(folder / "chat_template.json")


@pytest.mark.parametrize("adds", [True, False])
def test_there_is_one_begin_token(tmp_path: Path, adds: bool) -> None:
    folder = folder_with(tmp_path, LLAMA_3_PARTS)
    if not adds:
        values = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    conversation = ours(chosen(folder).name, ["What?", None])
    for ids in (Processor(tokenizer).encode_ids(conversation, 0), Processor(tokenizer).encode(conversation, 0)[0]):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    sample = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cube."}]
    ids = preprocess([sample], tokenizer, conv=get_template(chosen(folder).name))["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("llama-3", ["A red\n\ncube.<|eot_id|>", "Left {{ x }}<|eot_id|>"]),  # it trims
        ("llama-3 of parts", ["\nA red\n\ncube.<|eot_id|>", "\n Left {{ x }} <|eot_id|>"]),
        ("bakllava", [" A red\n\ncube.", "  Left {{ x }} "]),
        ("mistral", ["A red\n\ncube.</s>", " Left {{ x }} </s>"]),
    ],
)
def test_answers_and_their_ends_are_trained(tmp_path: Path, case: str, expected: list[str]) -> None:
    folder = folder_with(tmp_path, LLAMA_3 if case == "llama-3" else OWN[case][0])
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(DIALOGUE)]
    conversation = get_template(chosen(folder).name)
    spans = dialogue_spans(turns, conversation)
    assert [span.text for span in spans if span.trained] == expected
    assert "".join(span.text for span in spans) == ours(chosen(folder).name, [*DIALOGUE]).get_prompt()
    labels = preprocess([turns], load_tokenizer(folder), has_image=True, conv=conversation)["labels"][0]
    kept = [token for token in labels.tolist() if token != -100]
    assert load_tokenizer(folder).decode(kept) == "".join(expected)


def test_templates_that_drop_or_rewrite_text_are_refused(tmp_path: Path) -> None:
    """Rather than leaving system text out, or training on nothing."""
    shouting = MISTRAL.replace("message['content'] + eos_token", "message['content'] | upper + eos_token")
    conversation = get_template(chosen(folder_with(tmp_path, shouting)).name)
    with pytest.raises(InputError, match="leaves system text out"):
        conversation.with_system("Be brief.").get_prompt()
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cube."}]
    with pytest.raises(InputError, match="rewrites answers"):
        dialogue_spans(turns, conversation)
    conversation.messages = [["user", "What?"], ["assistant", "A cube."], ["user", "Sure?"], ["assistant", None]]
    assert conversation.get_prompt() == "<s>[INST] What? [/INST]A CUBE.</s>[INST] Sure? [/INST]"


def test_images_get_the_placeholder_of_this_package(tmp_path: Path) -> None:
    name = chosen(folder_with(tmp_path, OTHER_MARK)).name
    assert ours(name, ["<image>\nWhat?", None]).get_prompt().count("<image>\nWhat?") == 1
    wrapped = "<im_start><image><im_end>"
    assert f"{wrapped}{wrapped}\nWhat?" in ours(name, [f"{wrapped}\n{wrapped}\nWhat?", None]).get_prompt()


def test_without_one_the_type_decides(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    origin = "by the model's type and name"
    assert chosen(tmp_path) == ("llava_v1", origin)
    assert chosen(tmp_path, "qwen2") == ("qwen_1_5", origin)
    assert chosen(tmp_path, "phi3") == ("phi_3", origin)
    is_llama_3 = choose_template({}, "m", folder=tmp_path, has_token=lambda text: text == "<|start_header_id|>")
    assert is_llama_3.name == "llava_llama_3"
    declared = choose_template({"conv_mode": "v0"}, "m", folder=folder_with(tmp_path, LLAMA_3), has_token=bool)
    assert declared == ("v0", "named by conv_mode in config.json")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "is no valid Jinja: .*Unexpected end of template"),
        ("{% include '/etc/passwd' %}", "cannot render"),
        ("{% import 'os' as os %}{{ messages }}", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
        ("{{ messages[0]['content'] }}{{ 'x' * 1000000000 }}", "too large"),
        ("{{ messages[0]['content'] }}{{ '%1000000000d' % 1 }}", "width or count"),
        ("{{ messages[0]['content'] }}{{ 'x'.ljust(1000000000) }}", "width or count"),
        ("{{ messages[0]['content'] }}{{ 'x' | center(1000000000) }}", "width or count"),
        ("{{ messages[0]['content'] }}{% for i in range(9000) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
        ("{{ messages[0]['content'] }}{% for i in range(10000000) %}{% endfor %}", "Range too big|width or count"),
        ("{{ raise_exception('no chat here') }}", "no chat here"),
        ("USER:", "leaves the user's text out"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "is longer than"),
    ],
)
def test_a_bad_template_is_one_sentence_that_names_the_file(tmp_path: Path, template: str, reason: str) -> None:
    folder = folder_with(tmp_path, template)
    with pytest.raises(InputError, match=reason) as raised:
        chosen(folder)
    assert str(folder / "chat_template.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_system_text_that_a_template_refuses_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, GEMMA.replace("<end_of_turn>", "<end>"))
    with pytest.raises(InputError, match="System role not supported"):
        ours(chosen(folder).name, ["What?", None], "Be brief.").get_prompt()


def test_files_that_hold_no_template_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for name, reason in (("tokenizer_config.json", "holds no chat template"), ("absent.jinja", "there is no chat")):
        with pytest.raises(InputError, match=reason):
            get_template(str(tmp_path / name))
    assert str(tmp_path / "tokenizer_config.json") not in conv_templates


@pytest.mark.parametrize(
    ("template", "origin"),
    [
        (MISTRAL, "the folder's own chat template"),
        (PHI_3, "equal to the folder's chat template"),
        (None, "by the model's"),
    ],
)
def test_loading_info_doctor_and_chat_say_the_same(tmp_path: Path, template: str | None, origin: str) -> None:
    folder = build(tmp_path / "model")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    loaded = load(folder, device="cpu")
    assert loaded.template_origin.startswith(origin)
    facts = describe_checkpoint(folder).facts
    assert (facts["template"], facts["template from"]) == (loaded.conv_mode, loaded.template_origin)
    report = examine_checkpoint(folder, quick=True)
    assert (report.facts["template"], report.facts["template_from"]) == (loaded.conv_mode, loaded.template_origin)
    assert "chat-template" not in report.codes
    done = run_llava("chat", "-v", "-m", str(folder), "--device", "cpu", "--max-new-tokens", "1", "What?")
    assert f"template {loaded.conv_mode} ({loaded.template_origin})" in done.stderr
    assert Session(loaded).conversation("Hi?").get_prompt() == ours(loaded.conv_mode, ["Hi?", None]).get_prompt()
    if template == MISTRAL:
        assert ours(loaded.conv_mode, ["Hi?", None]).get_prompt().endswith("[INST] Hi? [/INST]")


@pytest.mark.slow
def test_a_training_step_uses_it(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(LLAMA_3_PARTS)
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cube."}]
    data.write_text(json.dumps([{"id": "one", "conversations": turns}]))
    done = run_llava("trace", "--data", str(data), "-m", str(folder))
    assert "18 of 124 tokens are trained" in done.stdout, done.stderr  # those of "\n" + answer + "<|eot_id|>"


def test_doctor_names_a_damaged_template(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert "template-unreadable" in examine_checkpoint(folder, quick=True).codes
    with pytest.raises(InputError, match=r"chat_template\.jinja is no valid Jinja"):
        load(folder, device="cpu")


def test_conversion_keeps_the_folders_template(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", vocab_size=259)
    (folder / "chat_template.jinja").write_text(LLAMA_3_PARTS)
    before = load(folder, device="cpu")
    done = run_llava("convert", str(folder), str(tmp_path / "hf"), "--to", "transformers")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder)
    after = load(tmp_path / "hf", device="cpu")
    assert after.template_origin == before.template_origin == "the folder's own chat template"
    assert "conv_mode" not in json.loads((tmp_path / "hf/config.json").read_text())
    assert (tmp_path / "hf/chat_template.jinja").read_text() == LLAMA_3_PARTS


def test_a_page_takes_the_template_from_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, since the file lies elsewhere; a file that a server names is not opened."""
    name = chosen(folder_with(tmp_path, LLAMA_3_PARTS)).name
    card = ModelCard("far", get_template(name), name, context_len=None, image_placeholder="<image>")
    listed = json.loads(asyncio.run(ModelApi(SimpleNamespace(card=card)).models()).as_json())
    assert str(tmp_path) not in json.dumps(listed)
    listed["data"].append({"id": "bad", "conv_mode": name})
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=listed))
    monkeypatch.setattr(PageClient, "_client", lambda self, key: httpx.AsyncClient(transport=transport))
    client = PageClient("http://server")
    assert asyncio.run(client.models()) == ["bad", "far"]
    conversation = client.template("far")
    conversation.append_message(conversation.roles[0], "Hi?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == ours(name, ["Hi?", None]).get_prompt()
    with pytest.raises(InputError, match="not known here"):
        client.template("bad")


YI = (  # of a folder whose language model is Yi
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}"
    "{{'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "model_type", "token", "expected"),
    [
        (MISTRAL, "mistral", "", "mistral_instruct"),
        (YI, "llama", "<|im_start|>", "chatml_direct"),
        (BAKLLAVA, "mistral", "", None),
    ],
    ids=["llava-v1.6-mistral", "llava-v1.6-34b", "BakLLaVA-1"],
)
def test_the_language_model_s_template_in_the_original_layout(
    tmp_path: Path, template: str, model_type: str, token: str, expected: str | None
) -> None:
    """LLaVA's training left it in the folder and rendered its own; the two open alike. Where they do not, it is the model's."""
    folder = folder_with(tmp_path, template)
    config = {"model_type": f"llava_{model_type}", "mm_vision_tower": "tower"}
    choice = choose_template(config, "model", folder=folder, has_token=lambda text: text == token)
    assert choice.name == (expected or str(folder / "chat_template.json"))
    in_theirs = {"model_type": "llava_next", "text_config": {"model_type": model_type}}
    assert (
        choose_template(in_theirs, "model", folder=folder, has_token=lambda text: text == token).name != "chatml_direct"
    )
