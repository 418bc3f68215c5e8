"""`llava trace`: what it shows is what happens, it changes nothing, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from golden_data import HERE, golden
from repository import ROOT, defined_in
from trace_kit import ANSWERING, QUESTION, star

import llava
from llava.assets import embedded_model_path
from llava.diagnose.tracer.attention import compute_views
from llava.diagnose.tracer.generation import TracedAnswer, trace_question
from llava.diagnose.tracer.hooks import trace
from llava.diagnose.tracer.hooks_sequence import segments
from llava.diagnose.tracer.record import POINTS
from llava.engine.request import PromptSize, SamplingParams
from llava.model.builder import LoadedModel, load
from llava.model.splice import splice
from llava.session import LoadedImage, Session
from llava.text.tokenization import tokenizer_image_token


@pytest.fixture(autouse=True)
def among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load(embedded_model_path(), device="cpu")


@pytest.fixture(scope="module")
def answered(embedded: LoadedModel) -> TracedAnswer:
    return trace_question(embedded, [star()], QUESTION)


# Every point, on every kind of model


def test_every_point_names_a_function_that_exists() -> None:
    for point in POINTS.values():
        path, _, name = point.where.partition(":")
        assert name in defined_in(ROOT / path), point.where


def test_all_points_come_in_the_order_of_the_flow(answered: TracedAnswer) -> None:
    assert [seen.point for seen in answered.record] == ANSWERING
    assert answered.record.failed == []


@pytest.mark.parametrize(
    "name",
    [
        "llava-v1.5-tiny-vicuna",
        "llava-v1-tiny-linear",
        "llava-v1.6-tiny-vicuna",
        "llava-tiny-mpt",
        "llava-v1.5-tiny-lora",
    ],
)
def test_recorded_models_pass_every_check(name: str) -> None:
    loaded = load(golden(f"checkpoints/{name}"), device="cpu")
    images = [LoadedImage.open("images/text_200x80.png"), LoadedImage.open("images/noise_40x90.png")]
    seen = trace_question(loaded, images, "What are these?", sampling=SamplingParams(max_new_tokens=4))
    assert [point.point for point in seen.record] == ANSWERING
    assert seen.record.failed == []
    views = compute_views(seen)
    assert views is not None
    assert views.agreement is not None
    assert views.agreement < 1e-4
    assert views.attention is not None


@pytest.mark.parametrize("language_model", ["mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("settings", [{}, tiny.ANYRES], ids=["pad", "anyres"])
def test_built_models_pass_every_check(language_model: str, settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(tiny.build(tmp_path / "model", language_model, conv_mode="llava_v1", **settings), device="cpu")
    seen = trace_question(loaded, [star()], QUESTION, sampling=SamplingParams(max_new_tokens=3))
    assert seen.record.failed == []
    assert len(seen.record["layers"]["layers"]) == 2
    assert compute_views(seen) is not None


# What it shows is what happens


def test_the_answer_is_that_of_an_untraced_run(answered: TracedAnswer, embedded: LoadedModel) -> None:
    assert answered.answer is not None
    assert answered.answer.text == Session(embedded).answer(QUESTION, star().image) == "The star is yellow."
    assert answered.record["text"]["raw"] == " The star is yellow.</s>"
    assert answered.record["text"]["leftover"] == []


def test_ids_and_lengths_are_those_of_the_functions(answered: TracedAnswer, embedded: LoadedModel) -> None:
    record = answered.record
    ids = tokenizer_image_token(record["prompt"]["text"], embedded.tokenizer)
    assert record["input_ids"]["ids"] == ids
    size = PromptSize(sum(token >= 0 for token in ids), embedded.processor.plan([(448, 448)])[0].num_features)
    limit, row = record["limit"], record["splice"]["rows"][0]
    assert (limit["text_tokens"], limit["image_tokens"]) == (size.num_text_tokens, size.num_image_tokens) == (14, 64)
    assert limit["allowed"] == limit["given_to_generate"] == 512
    assert row["length"] == row["expected"] == size.total
    assert record["splice"]["inputs_embeds"]["shape"] == [1, 78, 320]
    assert record["splice"]["attention_mask"]["sum"] == 78


def test_the_limit_is_shown_before_and_after_it_is_cut(embedded: LoadedModel) -> None:
    record = trace_question(embedded, [star()], QUESTION, sampling=SamplingParams(max_new_tokens=2000)).record
    assert (record["limit"]["wanted"], record["limit"]["allowed"], record["limit"]["given_to_generate"]) == (
        2000,
        946,
        946,
    )


def test_features_are_those_of_tower_and_projector(answered: TracedAnswer, embedded: LoadedModel) -> None:
    record, tower = answered.record, embedded.model.get_vision_tower()
    pixels = llava.mm_utils.process_images([star().image], embedded.image_processor, embedded.model.config)
    assert record["pixels"]["images"][0]["shape"] == list(pixels.shape[1:])
    with torch.inference_mode():
        states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = embedded.model.encode_images(pixels)
    assert record["tower"]["norms"] == pytest.approx([float(state.norm(dim=-1).mean()) for state in states], rel=1e-5)
    assert record["projector"]["features"]["norm"] == pytest.approx(float(features.norm(dim=-1).mean()), rel=1e-5)
    weights = {name: list(tensor.shape) for name, tensor in embedded.model.get_model().mm_projector.named_parameters()}
    assert {name: facts["shape"] for name, facts in record["projector"]["weights"].items()} == weights


def test_candidates_are_the_models_own(answered: TracedAnswer, embedded: LoadedModel) -> None:
    ids = torch.tensor([answered.ids])
    with torch.inference_mode():
        logits = embedded.model(input_ids=ids, images=answered.pixels, image_sizes=[(448, 448)]).logits[0, -1]
    first = answered.record["first_tokens"]["steps"][0]
    chances, tokens = logits.softmax(-1).topk(5)
    assert [entry["id"] for entry in first] == tokens.tolist()
    assert [entry["p"] for entry in first] == pytest.approx(chances.tolist(), abs=1e-5)
    chosen = [step[0]["id"] for step in answered.record["first_tokens"]["steps"]]
    assert answered.answer is not None
    assert chosen == list(answered.answer.token_ids)


def test_segments_are_where_the_splice_puts_things() -> None:
    """Every position of the splice, against features and embeddings that say where they come from."""
    ids, lengths = [5, -200, 6, 7, -200, -200, 8], [3, 2, 4]
    features = [torch.full((length, 1), 100.0 + number) for number, length in enumerate(lengths)]
    spliced = splice(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), features, lambda x: x[:, None].float()
    )
    found = spliced.embeds[:, 0].tolist()
    drawn: list[float] = []
    for part in segments(ids, lengths):
        assert part["start"] == len(drawn)
        drawn += part["ids"] if part["kind"] == "text" else [100.0 + part["image"]] * (part["stop"] - part["start"])
        assert part["stop"] == len(drawn)
    assert drawn == found


def test_batches_are_watched_row_by_row(embedded: LoadedModel, answered: TracedAnswer) -> None:
    ids = torch.tensor([answered.ids, [0] * 4 + answered.ids[4:]])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.clone()
    labels[:, :10] = -100
    pixels = torch.cat([answered.pixels, answered.pixels])
    with trace(embedded.model, embedded.tokenizer) as seen:
        embedded.model(input_ids=ids, attention_mask=mask, images=pixels, labels=labels, image_sizes=[(448, 448)] * 2)
    rows = seen["splice"]["rows"]
    assert [row["length"] for row in rows] == [78, 74]
    assert [row["trained"] for row in rows] == [5, 5]
    assert seen.failed == []


# Faults show


def test_nan_shows_where_it_begins(tmp_path: Path) -> None:
    loaded = load(tiny.build(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        loaded.model.get_model().mm_projector[2].weight[0, 0] = float("nan")
    with trace(loaded.model) as seen:
        loaded.model.encode_images(torch.zeros(1, 3, 28, 28))
    assert [point for point, _ in seen.failed] == ["projector"]
    assert seen["tower"].failed == []


def test_a_wrong_size_of_pixels_shows(tmp_path: Path) -> None:
    loaded = load(tiny.build(tmp_path / "model"), device="cpu")
    with trace(loaded.model) as seen, contextlib.suppress(ValueError):
        loaded.model.encode_images(torch.zeros(1, 3, 56, 56))
    assert seen.failed[0][0] == "pixels"


# Nothing is left behind


def traces_left(model: Any) -> tuple[int, set[str]]:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return hooks, {"generate", "_splice_batch", "image_features"} & set(vars(model))


def test_hooks_and_wrappers_are_taken_away(embedded: LoadedModel) -> None:
    import llava.processor as processor
    from llava.engine.request import PromptSize

    functions = processor.encode_spans, processor.process_images, processor.plan_images, PromptSize.room
    before = traces_left(embedded.model)
    trace_question(embedded, [star()], QUESTION)
    with pytest.raises(llava.InputError), trace(embedded.model):
        embedded.model.generate(torch.tensor([[1, -200]]))
    with pytest.raises(llava.InputError):
        trace_question(embedded, [star()], "long " * 2000)
    assert traces_left(embedded.model) == before
    assert functions == (processor.encode_spans, processor.process_images, processor.plan_images, PromptSize.room)


def test_looking_at_attention_leaves_the_model_as_it_was(answered: TracedAnswer, embedded: LoadedModel) -> None:
    before = traces_left(embedded.model), embedded.model.config._attn_implementation
    compute_views(answered)
    assert (traces_left(embedded.model), embedded.model.config._attn_implementation) == before
    assert all(parameter.grad is None for parameter in embedded.model.parameters())


# Attention and relevance


def test_attention_is_that_of_the_language_model(answered: TracedAnswer) -> None:
    """Against transformers' own way of handing attention out, in a model that was loaded for it."""
    views = compute_views(answered, gradients=False)
    assert views is not None
    assert views.attention is not None
    assert answered.answer is not None
    eager = load(embedded_model_path(), device="cpu", attn_implementation="eager")
    ids = torch.tensor([[*answered.ids, *answered.answer.token_ids[:-1]]])
    with torch.inference_mode():
        output = eager.model(input_ids=ids, images=answered.pixels, image_sizes=[(448, 448)], output_attentions=True)
    expected = torch.stack([layer[0].mean(0) for layer in output.attentions])
    positions = [position for position, _, _ in views.rows]
    torch.testing.assert_close(views.attention, expected[:, positions][:, :, 5:69], atol=1e-6, rtol=1e-4)


def test_relevance_is_what_a_change_of_a_feature_does(answered: TracedAnswer, embedded: LoadedModel) -> None:
    """Each feature made a little larger, and the change of the log-probability of "yellow"."""
    views = compute_views(answered)
    assert views is not None
    assert views.relevance is not None
    assert answered.answer is not None
    step = next(
        n for n, token in enumerate(answered.answer.token_ids) if "yellow" in embedded.tokenizer.decode([token])
    )
    ids = torch.tensor([[*answered.ids, *answered.answer.token_ids[:-1]]])
    model = embedded.model
    with torch.no_grad():
        embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, answered.pixels, [(448, 448)])[
            4
        ]
        for feature in (int(views.relevance[step].argmax()), 40):
            chances = []
            for factor in (0.998, 1.002):
                changed = embeds.clone()
                changed[0, 5 + feature] *= factor
                logits = model.double()(inputs_embeds=changed.double()).logits[0, 77 + step]
                chances.append(float(logits.log_softmax(-1)[answered.answer.token_ids[step]]))
            model.float()
            change = abs(chances[1] - chances[0]) / 0.004
            assert float(views.relevance[step, feature]) == pytest.approx(change, rel=0.02, abs=1e-6)


def test_yellow_was_read_off_the_star(answered: TracedAnswer) -> None:
    """The star is in the upper middle of the image: rows 0 to 2 and columns 2 to 5 of 8 x 8."""
    views = compute_views(answered)
    assert views is not None
    assert views.relevance is not None
    grid = views.relevance[3].reshape(8, 8)
    assert float(grid[:3, 2:6].sum() / grid.sum()) > 0.5
