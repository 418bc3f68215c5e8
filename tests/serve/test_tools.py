"""Tools without a server: how templates write calls, how answers are split into text and calls, and what grammars allow."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from engine_kit import loaded
from hypothesis import given
from hypothesis import strategies as st

from llava.chat_template import ToolCallForm, checked_template
from llava.conversation import conversation_from, get_template
from llava.engine.engine import Engine
from llava.engine.request import Chunk, Request, SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, parsed_chat
from llava.serve.tools import PLAIN_FORM, Tool, ToolCall, ToolCallReader, ToolUse, calls_of, form_of

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "Tells the weather.", PARAMETERS)
CLOCK = Tool("clock", "Tells the time.", {"type": "object", "properties": {}, "additionalProperties": False})

# The three ways in which published templates write calls.
TAGGED = """\
{%- if tools %}<|start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|start|>user
<tool_response>{{ message.content }}</tool_response><|end|>
{% else %}<|start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ "\\n" if not loop.first or message.content else "" }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% endif %}"""
BARE = """\
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}[a]{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}[z]
{%- elif message.role == "tool" %}[t]{{ message.content | tojson }}[z]
{%- else %}[{{ message.role[0] }}]{% if loop.first and tools %}{{ tools | tojson }}
{% endif %}{{ message.content }}[z]
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}[a]{% endif %}"""
LISTED = """\
{%- for message in messages %}
{%- if message.role == "user" %}{% if tools and loop.first %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("an id has nine letters") }}{% endif %}
{%- set written = {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} %}
{{- written | tojson }}{{ ", " if not loop.last else "" }}
{%- endfor %}]</s>
{%- elif message.role == "tool" %}[RESULTS]{"content": {{ message.content }}, "id": "{{ message.tool_call_id }}"}[/RESULTS]
{%- else %}{{ message.content }}</s>
{%- endif %}
{%- endfor %}"""
WITHOUT = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TEMPLATES = {
    "tagged": (TAGGED, PLAIN_FORM),
    "bare": (BARE, ToolCallForm("", "", None, "name", "parameters")),
    "listed": (LISTED, ToolCallForm("[TOOL_CALLS] [", "]", ", ")),
    "without": (WITHOUT, None),
}


def card_of(name: str) -> ModelCard:
    template = get_template("vicuna_v1") if name == "plain" else conversation_from(chat_template(name))
    return ModelCard("m", template, name, 2048, "<image>")


def chat_template(name: str) -> Any:
    return checked_template(TEMPLATES[name][0], {"eos_token": "</s>"}, place=f"{name}.jinja")


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_shows_how_it_writes_calls(name: str) -> None:
    assert chat_template(name).tool_call_form == TEMPLATES[name][1]


def read_in(use: ToolUse, text: str, sizes: list[int]) -> tuple[str, list[ToolCall], list[Any]]:
    """Text and calls of an answer that comes in pieces of these sizes, over and over."""
    reader, chunks, at, number = ToolCallReader(use), [], 0, 0
    while at < len(text):
        size = sizes[number % len(sizes)]
        chunks.append(reader.read(Chunk(0, text[at : at + size])))
        at, number = at + size, number + 1
    chunks.append(reader.read(Chunk(0, "", finish_reason="stop")))
    return "".join(chunk.text for chunk in chunks), calls_of(chunks), chunks


CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
OTHER = {"name": "clock", "arguments": {"quote": '}"{[\\', "deep": [{"a": {}}]}}
ONE, TWO = json.dumps(CALL), json.dumps(OTHER)
AS_TEXT = "<tool_call>" + json.dumps(CALL | {"arguments": json.dumps(CALL["arguments"])}) + "</tool_call>"
HALF = '<tool_call>{"name": "clock", "arguments": {"x": "\\ud800"}}</tool_call>'
BARE_FORM, LISTED_FORM = ToolCallForm("", "", None, "name", "parameters"), ToolCallForm("[TOOL_CALLS] [", "]", ", ")
ANSWERS = [
    (PLAIN_FORM, "It is sunny.", "It is sunny.", []),
    (PLAIN_FORM, f"<tool_call>\n{ONE}\n</tool_call>", "", [CALL]),
    (PLAIN_FORM, f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>", "Let me see.", [CALL]),
    (PLAIN_FORM, f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "", [CALL, OTHER]),
    (PLAIN_FORM, f"<tool_call>{TWO}</tool_call>", "", [OTHER]),
    (PLAIN_FORM, f"<tool_call>\n{ONE}", "", [CALL]),
    (PLAIN_FORM, f"<tool_call>\n{ONE}\n</tool", "", [CALL]),
    (PLAIN_FORM, f"<tool_call>\n{ONE}\n</tool_call> Then this.", "Then this.", [CALL]),
    (PLAIN_FORM, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', None, []),
    (PLAIN_FORM, '<tool_call>\n{"name": "weather", "argu', None, []),
    (PLAIN_FORM, "<tool_call> is how one calls", None, []),
    (PLAIN_FORM, "a < b and <tool", None, []),
    (PLAIN_FORM, ONE, "", [CALL]),
    (PLAIN_FORM, '{"colour": "red"}', None, []),
    (PLAIN_FORM, "[1] is a reference", None, []),
    (PLAIN_FORM, "[", None, []),
    (BARE_FORM, json.dumps({"name": "weather", "parameters": CALL["arguments"]}), "", [CALL]),
    (BARE_FORM, "Words {with} braces", None, []),
    (LISTED_FORM, f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [CALL, OTHER]),
    (LISTED_FORM, f"[{ONE}, {TWO}]", "", [CALL, OTHER]),  # a special token has no text
    (LISTED_FORM, "[TOOL", None, []),
    (PLAIN_FORM, AS_TEXT, "", [CALL]),
    (PLAIN_FORM, '<tool_call>{"name": "clock", "arguments": null}</tool_call>', "", [{"name": "clock", "arguments": {}}]),
    (PLAIN_FORM, HALF, "", [{"name": "clock", "arguments": {"x": "\ud800"}}]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS, ids=[answer for _, answer, _, _ in ANSWERS])
@pytest.mark.parametrize("sizes", [[1], [2, 5], [1000]])
def test_an_answer_is_split_the_same_however_it_comes(
    form: ToolCallForm, answer: str, text: str | None, calls: list[Any], sizes: list[int]
) -> None:
    use = ToolUse((WEATHER, CLOCK), form)
    written, found, _ = read_in(use, answer, sizes)
    assert written == (answer if text is None else text)
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in found] == calls
    assert len({call.call_id for call in found}) == len(calls)


@given(
    st.text(alphabet=st.sampled_from('<>/{}[]"\\:, \ntool_call'), max_size=60), st.lists(st.integers(1, 9), min_size=1)
)
def test_text_without_a_call_is_kept_as_it_is(text: str, sizes: list[int]) -> None:
    """Nothing is lost or added, but blank space beside what looks like a call."""
    written, found, _ = read_in(ToolUse((WEATHER,)), text, sizes)
    assert found == []
    assert "".join(written.split()) == "".join(text.split())


@pytest.mark.parametrize(
    "form", [PLAIN_FORM, TEMPLATES["bare"][1], TEMPLATES["listed"][1]], ids=["tags", "bare", "list"]
)
@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("tools", [(WEATHER, CLOCK), (WEATHER,)], ids=["two", "one"])
def test_a_required_call_obeys_its_schema(tools: tuple[Tool, ...], form: ToolCallForm, is_parallel: bool) -> None:
    """An engine that samples at random: the arguments stream in parts, and are always valid."""
    use = ToolUse(tools, form, is_required=True, is_parallel=is_parallel)
    asked = SamplingParams(temperature=5.0, seed=3, max_new_tokens=400, grammar=use.grammar())
    with Engine.from_loaded(loaded("llama")) as engine:
        requests = [Request("Well?" + use.beginning, sampling=replace(asked, seed=seed)) for seed in range(6)]
        answers = [result.completions[0] for result in engine.generate(requests)]
    for answer in answers:
        assert answer.finish_reason == "stop", answer.text
        text, calls, chunks = read_in(use, answer.text, [1])
        assert text == ""
        assert len(calls) >= 1
        assert is_parallel or len(calls) == 1
        for call in calls:
            arguments = json.loads(call.arguments)
            assert call.name in [tool.name for tool in tools]
            if call.name == "weather":
                assert arguments["city"] in ("Oslo", "Rome")
                assert 0 <= arguments["days"] <= 9
            else:
                assert arguments == {}
        parts = [delta for chunk in chunks for delta in chunk.calls]
        assert next(delta.name for delta in parts) == calls[0].name
        assert len(parts) > len(calls)


@pytest.mark.parametrize("form", [PLAIN_FORM, TEMPLATES["bare"][1]], ids=["tags", "bare"])
def test_a_strict_tool_is_held_to_its_schema_where_the_model_chooses(form: ToolCallForm) -> None:
    use = ToolUse((replace(WEATHER, is_strict=True),), form)
    model = loaded("llama")
    from llava.engine.grammar import GrammarMaker

    size = model.model.get_input_embeddings().weight.shape[0]
    maker = GrammarMaker(model.tokenizer, vocab_size=size, end_ids=frozenset([model.tokenizer.eos_token_id]))

    def allows(text: str) -> bool:
        grammar = maker(SamplingParams(grammar=use.grammar()))
        assert grammar is not None
        try:
            for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]:
                if not grammar.allowed(size)[token]:
                    return False
                grammar.accept(token)
        except InputError:
            return False
        return bool(grammar.allowed(size)[model.tokenizer.eos_token_id])

    body = json.dumps({form.name_key: "weather", form.arguments_key: {"city": "Oslo", "days": 2}})
    assert allows("Some words.")
    assert allows(form.opening + body + form.closing)
    assert not allows(form.opening + body.replace("Oslo", "Paris") + form.closing)
    assert not allows(form.opening + body[:-5])
    if form.opening:
        assert allows("First words. " + form.opening + body + form.closing)


def chat(*turns: ChatTurn, name: str, tools: ToolUse | None = None, **options: Any) -> str:
    parsed = parsed_chat(turns, card_of(name), SamplingParams(), tools=tools, **options)
    (prompt,) = parsed.prompts
    return prompt if isinstance(prompt, str) else prompt.get_prompt()  # type: ignore[union-attr]


MODES = ["llava_llama_2", "mistral_instruct", "chatml_direct", "llava_llama_3", "gemma_instruct"]
ASKED = ChatTurn("user", "Weather?")
CALLED = ChatTurn("assistant", "", calls=(ToolCall("weather", '{"city": "Oslo", "days": 2}', "call_x"),))
RESULT = ChatTurn("tool", "sunny", call_id="call_x", name="weather")


@pytest.mark.parametrize("name", ["plain", *TEMPLATES])
def test_the_prompt_has_tools_calls_and_results(name: str) -> None:
    form = form_of(card_of(name).template)
    required = ToolUse((WEATHER,), form, is_required=True)
    prompt = chat(ASKED, CALLED, RESULT, name=name, tools=replace(required, is_required=False))
    assert "Tells the weather." in prompt
    body = json.dumps({form.name_key: "weather", form.arguments_key: {"city": "Oslo", "days": 2}})
    assert body.removesuffix("}") in prompt.replace(', "id"', "").replace('"call00000"', "") or body[:-1] in prompt
    assert "sunny" in prompt
    assert prompt.index("Tells") < prompt.index("sunny")
    assert chat(ASKED, name=name, tools=replace(required, tools=(WEATHER, CLOCK))).endswith(form.opening)
    assert chat(ASKED, name=name, tools=required).endswith(body.partition('{"city"')[0])
    without = chat(ASKED, CALLED, RESULT, name=name)  # tool_choice none, later
    assert "Tells the weather." not in without
    assert "sunny" in without


def test_the_template_s_own_prompt_is_used() -> None:
    use = ToolUse((WEATHER,), form_of(card_of("listed").template))
    prompt = chat(ASKED, CALLED, RESULT, name="listed", tools=use)
    assert prompt == (
        f"[TOOLS]{json.dumps([WEATHER.as_json()])}[/TOOLS][INST]Weather?[/INST]"
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}, "id": "call00000"}]</s>'
        '[RESULTS]{"content": sunny, "id": "call00000"}[/RESULTS]'
    )


@pytest.mark.parametrize("mode", [*MODES, "plain", "mpt", "llava_v0", "tagged", "without"])
def test_an_answer_is_continued(mode: str) -> None:
    """The prompt ends with the last turn's words, and is the beginning of the prompt in which that turn is finished."""
    turns = [ChatTurn("user", "Who?"), ChatTurn("assistant", "I am")]
    name = mode if mode in (*TEMPLATES, "plain") else "other"
    if name == "other":
        card = ModelCard("m", get_template(mode), mode, 2048, "<image>")
    else:
        card = card_of(name)
    parsed = parsed_chat(turns, card, SamplingParams())
    prompt = parsed.prompts[0]
    assert isinstance(prompt, str)
    assert prompt.endswith("I am")
    finished = parsed_chat([*turns, ChatTurn("user", "Go on")], card, SamplingParams()).prompts[0]
    assert finished.get_prompt().startswith(prompt)  # type: ignore[union-attr]
    again = parsed_chat(turns, card, SamplingParams(), continues=False).prompts[0].get_prompt()  # type: ignore[union-attr]
    assert len(again) > len(prompt)
    assert not again.endswith("I am")


@pytest.mark.parametrize("mode", ["vicuna_v1", *MODES])
def test_turns_may_come_in_any_order(mode: str) -> None:
    card = ModelCard("m", get_template(mode), mode, 2048, "<image>")
    said = [
        ("assistant", "Hello!"), ("user", "Who?"), ("system", "Be brief."), ("assistant", ""), ("system", "Be kind."),
        ("user", "And now?"),
    ]  # fmt: skip
    turns = [ChatTurn(role, text) for role, text in said]
    prompt = parsed_chat(turns, card, SamplingParams()).prompts[0].get_prompt()  # type: ignore[union-attr]
    found = [prompt.index(text) for text in ("Be brief.\nBe kind.", "Hello!", "Who?", "And now?")]
    assert found[1:] == sorted(found[1:])
    assert found[0] < found[2]


def test_tools_that_cannot_be_offered_are_refused() -> None:
    with pytest.raises(InputError, match="two tools are named 'weather'"):
        ToolUse((WEATHER, WEATHER))
    with pytest.raises(InputError, match="tool name"):
        ToolUse((Tool("a b"),))
    with pytest.raises(InputError, match="no object"):
        ToolUse((Tool("a", parameters={"type": "string"}),))
