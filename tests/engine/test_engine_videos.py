"""Videos, several images and long prompts: the engine gives what `model.generate` gives, alone and in company."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from engine_kit import random_image
from PIL import Image
from video_kit import KINDS, loaded, random_video

from llava.conversation import get_template
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.hf_engine import HFEngine
from llava.engine.request import EmbedRequest, Request, SamplingParams
from llava.errors import InputError
from llava.images.frames import Video
from llava.images.layout import Grid

WAYS = {
    "as it is": EngineConfig(),
    "in pieces": EngineConfig(max_step_tokens=7),
    "without caches": EngineConfig(prefix_cache=False, feature_cache_bytes=0),
    "a tiny pool": EngineConfig(num_blocks=130, block_size=4),
    "guessing, in pieces": EngineConfig(speculation=3, max_step_tokens=16, max_running=2),
}
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)


@cache
def requests() -> tuple[Request, ...]:
    """Images and videos of several lengths, alone and together, some of them several times."""
    first, image = random_video(1), random_image(7, 60, 50)
    return (
        Request("<image>\nwhat happens?", [first], GREEDY),
        Request("<image>\nwhat happens? And then?", [first], GREEDY),
        Request("<image>\nwhat is it?", [image], GREEDY),
        Request("first <image> then <image> and <image>", [image, random_video(2, 9), first], GREEDY),
        Request("<image><image> differ in", [random_image(8), random_image(9)], GREEDY),
        Request("no picture", sampling=GREEDY),
        Request("<image>", [random_video(3, 1, times=False)], GREEDY),
    )


@cache
def expected(kind: str) -> list[tuple[int, ...]]:
    """What `model.generate` answers to each request alone."""
    with HFEngine(loaded(kind).model, loaded(kind).processor) as engine:
        return [engine.generate(request).completions[0].token_ids for request in requests()]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_differ_by_what_is_shown(kind: str) -> None:
    assert len(set(expected(kind))) == len(requests())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_engine_answers_as_generate_does(kind: str, way: str) -> None:
    config = WAYS[way]
    if way == "a tiny pool" and kind != "one":  # whose prompts are shorter
        config = replace(config, num_blocks=50)
    with Engine(loaded(kind).model, loaded(kind).processor, config) as engine:
        alone = [engine.generate(request).completions[0].token_ids for request in requests()]
        together = [result.completions[0].token_ids for result in engine.generate([*requests(), *reversed(requests())])]
        stats = engine.stats()
    assert alone == expected(kind)
    assert together == [*expected(kind), *reversed(expected(kind))]
    if way == "a tiny pool":
        assert stats.num_preemptions > 0


def test_a_video_is_encoded_once_and_its_prefix_computed_once() -> None:
    model = loaded("rows")
    with Engine(model.model, model.processor, EngineConfig()) as engine:
        calls: list[int] = []
        tower = model.model.get_vision_tower()
        hook = tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        try:
            video = random_video(4, 40)
            before = engine.generate(Request("<image>\nwhat happens?", [video], GREEDY))
            same = Video(tuple(frame.copy() for frame in video.frames), duration=99.0)
            again = engine.generate(Request("<image>\nwhat happens? Where?", [same], GREEDY))
            assert calls == [32, 8]  # in bounded batches
            other = Video((*video.frames[:-1], random_image(5)))
            engine.generate(Request("<image>\nwhat happens?", [other], GREEDY))
            assert calls == [32, 8, 32, 8]
            # The frames as images are not the video.
            engine.generate(Request("<image>" * 2, list(video.frames[:2]), GREEDY))
            assert len(calls) == 5
        finally:
            hook.remove()
    assert before.usage.num_image_tokens == again.usage.num_image_tokens == 40 * 2
    assert again.usage.num_cached_tokens >= 80


def test_times_are_told_where_the_checkpoint_or_the_video_says_so() -> None:
    video, image = random_video(1, 2), random_image(3)
    told = (
        "<image>\nThe video lasts for 1.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at "
        "0.00s,0.50s.Please answer the following questions related to this video.\nwhat happens?"
    )
    plain = "<image>\nwhat happens?"
    quiet, loud = loaded("rows").processor, loaded("one").processor
    assert quiet.with_times(plain, [video]) == plain
    assert loud.with_times(plain, [video]) == told
    assert loud.with_times(plain, [image]) == plain
    for processor in (quiet, loud):
        silent, telling = (Video(video.frames, video.times, 1.0, 2.0, tells) for tells in (False, True))
        assert processor.with_times(plain, [silent]) == plain
        assert processor.with_times(plain, [telling]) == told
        assert processor.with_times("<image><image> <image>", [image, telling, image]) == (
            "<image><image>" + told.removeprefix("<image>").removesuffix("what happens?") + " <image>"
        )
    conversation = get_template("qwen_1_5").copy()
    conversation.append_message(conversation.roles[0], plain)
    conversation.append_message(conversation.roles[1], None)
    noted = loud.with_times(conversation, [video])
    assert told in noted.get_prompt()
    assert told not in conversation.get_prompt()
    with Engine(loaded("one").model, loud, EngineConfig()) as engine:
        size = engine.submit(Request(plain, [video], GREEDY)).size
        assert size.num_text_tokens == len(loud.encode_ids(told, 1)) - 1


def test_inputs_of_images_and_videos_agree_with_their_layouts() -> None:
    model = loaded("rows")
    video = random_video(1, 3, size=(90, 30))
    inputs = model.processor("<image> and <image>", [random_image(1, 30, 90), video], details=["low", "auto"])
    assert inputs.modalities == ["image", "video"]
    assert inputs.pixels[1].shape == (3, 3, 28, 28)
    assert (inputs.layouts[1].grid, inputs.layouts[1].num_features) == (Grid(1, 1), 6)
    # Each frame as the processor makes it alone.
    alone = torch.stack(
        [model.image_processor.preprocess(frame, return_tensors="pt")["pixel_values"][0] for frame in video.frames]
    )
    assert torch.equal(inputs.pixels[1], alone)
    features = model.model.image_features(inputs.images, inputs.image_sizes, modalities=inputs.modalities)
    assert [len(each) for each in features] == [layout.num_features for layout in inputs.layouts]


def test_a_model_without_videos_says_so() -> None:
    from engine_kit import loaded as loaded_plain

    model = loaded_plain("llama")
    assert model.processor.video_policy is None
    with Engine(model.model, model.processor, EngineConfig()) as engine:
        with pytest.raises(
            InputError, match=r"takes images and no videos; give some of the video's frames, each as an image"
        ):
            engine.generate(Request("<image>", [random_video(1)], GREEDY))
        # As that sentence says:
        assert engine.generate(Request("<image><image>", list(random_video(1, 2).frames), GREEDY)).text is not None


def test_what_is_neither_image_nor_video_is_refused() -> None:
    for wrong in (np.zeros((3, 4, 4)), [Image.new("RGB", (4, 4))], "clip.mp4"):
        with pytest.raises(InputError, match=r"(?s)is .*, and not an image of PIL"):
            Request("<image>", [wrong])  # type: ignore[list-item]


@pytest.mark.slow
def test_a_prompt_of_ten_thousand_features_is_computed_in_pieces(tmp_path: Path) -> None:
    """A video of 181 frames of 56 features each, beside a short question that is answered meanwhile."""
    from llava.model.builder import load

    tower = tiny.SIGLIP | {"patch_size": 2}
    folder = tiny.build(tmp_path / "long", "qwen2", seed=4, siglip=True, tower=tower, max_position_embeddings=16384,
                        tokenizer_model_max_length=16384, **KINDS["rows"])  # fmt: skip
    model = load(folder, device="cpu")
    video = random_video(1, 181, size=(28, 28))
    request = Request("<image>\nwhat happens?", [video], SamplingParams(max_new_tokens=4, ignore_eos=True))
    with HFEngine(model.model, model.processor) as engine:
        whole = engine.generate(request)
    with Engine(model.model, model.processor, EngineConfig(max_step_tokens=1000)) as engine:
        chunked, short = engine.generate([request, Request("short", sampling=GREEDY)])
    assert chunked.usage.num_image_tokens == 181 * 56
    assert chunked.completions[0].token_ids == whole.completions[0].token_ids
    assert len(short.completions[0].token_ids) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_a_video(kind: str) -> None:
    """Those of each stage are the model's own."""
    model, video = loaded(kind), random_video(1)
    inputs = model.processor("<image>", [video])
    with torch.inference_mode():
        tower = model.model.get_vision_tower()(inputs.pixels[0]).flatten(0, 1).numpy()
        output = model.model(
            inputs.input_ids[None],
            images=inputs.pixels,
            image_sizes=inputs.image_sizes,
            modalities=inputs.modalities,
            output_hidden_states=True,
        )
    with Engine(model.model, model.processor) as engine:
        for asked, wanted in (
            ({"stage": "tower"}, tower),
            ({"prompt": "<image>", "layer": 0}, output.hidden_states[0][0].numpy()),
            ({"prompt": "<image>"}, output.hidden_states[-1][0].numpy()),
        ):
            made = engine.embed(EmbedRequest(images=[video], pooling="none", **asked))
            np.testing.assert_allclose(made.vectors, wanted, atol=2e-5)
