"""LLaVA's composition: a vision tower and a projector added to any causal language model of transformers.

In: token ids with -200 for each image, and pixels. Out: the same batch as embeddings, with attention mask, positions and
labels to match. The number of features of an image is computed in images/layout.py; its tiles' features are merged in
merge.py, those of a video's frames in video.py, and inserted into the sequence in splice.py; projector files are read by
multimodal_projector/pretrained.py. What differs between language models is in language_model/.

    N tiles, P patches per tile, V width of the tower, D text width, B rows, L tokens before and T after the splice
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.errors import InputError
from llava.images.layout import ImagePolicy
from llava.images.video_layout import VideoPolicy, plan_video
from llava.model.attention import packed_arguments
from llava.model.config import PLAIN_DECODERS, LlavaSettings, language_model_type
from llava.model.features import (
    LearnedEnds,
    Modalities,
    Pixels,
    Sizes,
    VisionInputs,
    merge_features,
    read_positional,
    split_entries,
)
from llava.model.loss import TOKEN_MEAN, LossRule, can_fuse, mean_loss, next_token_loss, router_loss
from llava.model.merge import unpad_image, with_newline_in_graph
from llava.model.multimodal_encoder.builder import build_vision_tower, check_processor, policy_of, save_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.multimodal_projector.pretrained import load_projector
from llava.model.splice import PaddedBatch, Spliced, check_max_length, on_device, pack, pad, splice
from llava.model.tokenizer_setup import add_image_tokens
from llava.model.transformers_internals import attention_of, eager_attention, register_recorded_outputs
from llava.model.video import reduced

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedConfig

    # What the two mixins below are mixed into.
    from transformers import PreTrainedModel as _CausalBase
    from transformers import PreTrainedModel as _InnerBase

    from llava.model.protocols import InnerModel, VisionArguments, VisionTower
    from llava.text.tokenization import Tokenizer
else:
    _InnerBase = _CausalBase = object


__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image", "with_vision"]


class LlavaMetaModel(_InnerBase):
    """Mixin for a language model's inner model: `vision_tower`, `mm_projector` and, for spatial_unpad, `image_newline`."""

    def add_vision_modules(self, attn_implementation: str | None = None) -> None:
        """Create the modules that the config declares; called once, after the language model is built."""
        settings = LlavaSettings.from_hf(self.config)
        if settings.vision.tower is None:
            return
        tower = build_vision_tower(self.config, delay_load=True, attn_implementation=attn_implementation)
        check_processor(tower)
        if settings.vision.in_checkpoint:
            tower.build_model()
        self.vision_tower: CLIPVisionTower | list[CLIPVisionTower] = tower
        self.mm_projector = build_vision_projector(self.config)
        self._add_learned_ends(settings)

    def _add_learned_ends(self, settings: LlavaSettings) -> None:
        """Add the features that end rows, images and frames, where the settings have them and they do not exist."""
        wanted = {
            "image_newline": settings.image.merge == "spatial_unpad",
            "faster_token": settings.video.slow_every is not None,
        }
        for name, is_wanted in wanted.items():
            if is_wanted and not hasattr(self, name):
                width = self.config.hidden_size
                setattr(self, name, nn.Parameter(torch.empty(width).normal_(std=1 / math.sqrt(width))))

    def get_vision_tower(self) -> CLIPVisionTower | None:
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args: VisionArguments, fsdp: object = None) -> None:
        """Add tower and projector for training, and write their settings to the config.

        Modules that exist already keep their weights. With `fsdp` the frozen tower is kept out of the sharded module.
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = model_args.mm_patch_merge_type
        for key in ("s2", "s2_scales"):
            if getattr(model_args, key, None):
                setattr(config, key, getattr(model_args, key))

        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(config)
            self.vision_tower = [tower] if fsdp else tower
        tower.select(config.mm_vision_select_layer, config.mm_vision_select_feature)
        tower.load_model()
        config.use_mm_proj = True
        has_projector = getattr(self, "mm_projector", None) is not None
        if has_projector and tower.hidden_size != config.mm_hidden_size:
            raise InputError(
                f"mm_vision_select_layer {config.mm_vision_select_layer} gives features of width {tower.hidden_size}, and the "
                f"model's projector takes {config.mm_hidden_size}; leave it out, so that it is the model's own"
            )
        config.mm_hidden_size = tower.hidden_size

        if not has_projector:
            config.mm_projector_type = getattr(model_args, "mm_projector_type", None) or "linear"
            self.mm_projector = build_vision_projector(config)
        self._add_learned_ends(LlavaSettings.from_hf(config))
        for parameter in self.mm_projector.parameters():  # LoRA may have frozen it
            parameter.requires_grad = True
        projector_file = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if projector_file is not None:
            load_projector(self, projector_file)


@cache
def with_vision(inner_class: type) -> type:
    """Derive a class from an inner model's class and LlavaMetaModel."""
    return type(f"Llava{inner_class.__name__}", (LlavaMetaModel, inner_class), {"__module__": __name__})


class LlavaMetaForCausalLM(_CausalBase):
    """Mixin for a causal language model: images in `forward` and `generate`.

    It stands before the language model's class in the list of bases. The language model builds itself; then the class of
    its inner model is changed to `model_class` (by default its own class with LlavaMetaModel) and the vision modules are
    added. torch's fully_shard changes the class of a built module in the same way; parameters and their names stay.
    """

    model_class: type | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        asked_attention = attention_of(config)  # None where the language model chooses
        super().__init__(config, *args, **kwargs)
        inner = self.get_model()
        inner_class: Any = type(inner)
        inner.__class__ = self.model_class or with_vision(inner_class)
        register_recorded_outputs(inner)
        inner.add_vision_modules(asked_attention)
        # Again, since post_init depends on the class and on the modules that exist.
        inner.post_init()
        self.post_init()

    def get_model(self) -> InnerModel:
        """The inner model, which holds embeddings, layers, vision tower and projector."""
        inner: InnerModel = getattr(self, self.base_model_prefix)
        return inner

    def get_vision_tower(self) -> VisionTower | None:
        return self.get_model().get_vision_tower()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save as transformers does, with the tower's files where its name refers to this model's folder."""
        super().save_pretrained(save_directory, **kwargs)
        tower = self.get_vision_tower()
        if tower is not None and kwargs.get("is_main_process", True):
            save_tower(tower, self.config, Path(save_directory))

    # Images to features.

    def image_policy(self) -> ImagePolicy:
        """How this model cuts images and joins their features, for `images.layout.plan` and the image processor."""
        tower = self.get_vision_tower()
        if tower is None:
            raise InputError("this model has no vision tower, so it cannot look at images")
        return policy_of(tower, LlavaSettings.from_hf(self.config).image)

    def video_policy(self) -> VideoPolicy:
        """How this model reduces and joins the features of a video's frames, for `images.video_layout.plan_video`."""
        return LlavaSettings.from_hf(self.config).video

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) to features in the language model's width (N, P, D)."""
        return self._projected(self._tower_features(images))

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encode a video's frames (F, 3, H, W) for a model that reduces them before the projector: (F, rows * cols, D)."""
        policy = self.video_policy()
        layout = plan_video(len(frames), self.image_policy(), policy)
        grids = reduced(self._tower_features(frames), layout.grid, policy, policy.stride)  # (F, rows, cols, V)
        return self._projected(grids.flatten(1, 2))

    def _tower_features(self, images: Tensor) -> Tensor:
        tower = self.get_vision_tower()
        assert tower is not None, "a model without a vision tower was given images"
        return tower(images)  # (N, P, V)

    def _projected(self, features: Tensor) -> Tensor:
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), features)
        # A projector with quantized weights casts its input itself.
        if weight.is_floating_point():
            features = features.to(device=weight.device, dtype=weight.dtype)
        return projector(features)

    def image_features(
        self,
        images: Tensor | Sequence[Tensor],
        image_sizes: Sizes,
        *,
        modalities: Modalities = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Encode images and videos, and merge the features of each one's tiles or frames: one (n, D) tensor for each.

        Args:
            images: A batch (N, 3, H, W) of single tiles, whose features are not merged; or a list of (tiles, 3, H, W) or
                (frames, 3, H, W), or a tensor (entries, tiles, 3, H, W), which are.
            image_sizes: (width, height) of each entry, needed where tiles are merged by position.
            modalities: "image" or "video" for each entry; None where all are images. One video may be a batch of frames.
            encode: Used in place of `encode_images`.
        """
        if len(images) == 0:
            return []
        tiles, kinds = split_entries(images, modalities)
        encode, dtype = encode or self.encode_images, self.get_input_embeddings().weight.dtype
        # Cast here: under mixed precision the splice would cast features to the text's dtype one by one.
        if "video" in kinds and self.video_policy().before_projector:
            encoded = [
                (self.encode_frames if kind == "video" else encode)(entry).to(dtype)
                for entry, kind in zip(tiles, kinds, strict=True)
            ]
        elif isinstance(tiles, Tensor):
            encoded = list(encode(tiles).to(dtype))
        else:  # on one device, so that they can be joined; the tower moves them to its own
            joined = torch.cat([entry.to(tiles[0].device) for entry in tiles])
            encoded = list(encode(joined).to(dtype).split([len(entry) for entry in tiles]))
        # Read for either kind of batch: ZeRO-3 gathers weights when they are read, which ranks must do in the same order.
        inner = self.get_model()
        ends = LearnedEnds(getattr(inner, "image_newline", None), getattr(inner, "faster_token", None))
        if isinstance(tiles, Tensor):
            return with_newline_in_graph(with_newline_in_graph(encoded, ends.newline), ends.faster_token)
        return merge_features(encoded, kinds, image_sizes, self.image_policy(), self.video_policy(), ends)

    # Features into the sequence.

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        images: Pixels,
        *rest: Modalities | Sizes,
        modalities: Modalities = None,
        image_sizes: Sizes = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Cache | None, Tensor | None, Tensor | None]:
        """Replace ids (B, L) by embeddings (B, T, D) in which each -200 is replaced by its image's or video's features.

        By position, `image_sizes` may be the seventh argument, as in LLaVA, or `modalities` the seventh and `image_sizes` the
        eighth, as in LLaVA-NeXT. Rows are padded on `config.tokenizer_padding_side`. Training rows longer than
        `config.tokenizer_model_max_length` are truncated at the end, with a warning.

        Returns:
            `(input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`. Without images or a tower,
            or for a decoding step of one token, the arguments are returned with `inputs_embeds` None. Otherwise
            `input_ids` is None, and of mask, positions and labels those stay None that were.

        Raises:
            InputError: A prompt is longer than the limit (its end is the question), or images and image tokens differ in
                number.
        """
        if images is None or self.get_vision_tower() is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        settings = LlavaSettings.from_hf(self.config)
        vision = read_positional(images, rest, modalities, image_sizes)
        batch = self._splice_batch(input_ids, attention_mask, labels, vision, side=settings.padding_side)
        return (
            None,
            None if position_ids is None else batch.positions,
            None if attention_mask is None else batch.mask.to(attention_mask.dtype),
            past_key_values,
            batch.embeds,
            batch.labels,
        )

    def _splice_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        vision: VisionInputs,
        *,
        side: str,
    ) -> PaddedBatch:
        """Splice a batch and pad its rows on `side`. `llava trace` records the result."""
        spliced = self._splice(input_ids, attention_mask, labels, vision)
        return pad(spliced, side=side, max_length=LlavaSettings.from_hf(self.config).max_length)

    @property
    def replaces_prepare(self) -> bool:
        """Whether `prepare_inputs_labels_for_multimodal` is another one: of a subclass, or set on the class or the instance."""
        return getattr(self.prepare_inputs_labels_for_multimodal, "__func__", None) is not OWN_PREPARE

    def check_packable(self) -> None:
        """Raise an `InputError` if samples packed into one row would attend to each other, or go past a replaced splice."""
        if self.replaces_prepare:
            raise InputError(
                "samples cannot be packed for a model whose prepare_inputs_labels_for_multimodal was replaced; leave "
                "--packing False"
            )
        kind = language_model_type({"model_type": self.config.model_type})
        if kind not in PLAIN_DECODERS:
            raise InputError(
                f"samples cannot be packed for a language model of type {kind!r}, which would attend across them; leave "
                f"--packing False, or use one of {', '.join(PLAIN_DECODERS)}"
            )

    def _splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        vision: VisionInputs,
    ) -> Spliced:
        if vision.images is None:
            self._refuse_image_tokens_without_images(input_ids)
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        images, sizes, modalities = vision
        features = [] if images is None else self.image_features(images, sizes, modalities=modalities)
        spliced = splice(input_ids, valid, features, self._embed, labels=labels)
        limit = LlavaSettings.from_hf(self.config).max_length
        check_max_length(spliced.lengths, limit, is_prompt=labels is None)
        return spliced

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.get_input_embeddings()
        # Only from the host: an offloaded table is moved to the device of the ids when it is called.
        if ids.device.type == "cpu" and table.weight.device.type == "cuda":
            ids = on_device(ids, table.weight.device)
        return table(ids)

    # Forward and generate.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Pixels = None,
        image_sizes: Sizes = None,
        return_dict: bool | None = None,
        modalities: Modalities = None,
        packed: bool = False,
        loss_only: bool = False,
        loss_rule: LossRule = TOKEN_MEAN,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the language model with images in place of the -200 in `input_ids` (B, L).

        Arguments that are not listed are those of the language model.

        Args:
            images: Pixels, as `image_features` takes them, with their `image_sizes` and `modalities`.
            output_attentions: Compute attention weights, by eager attention.
            packed: Pack the batch's rows into one, for training: no padding is computed and no sample sees another.
            loss_only: Leave out the logits, the largest tensors of a training step, where labels are given and the
                language model allows it.
            loss_rule: How the losses of tokens are averaged.
        """
        lengths = None  # of samples in a packed row
        if packed:
            self.check_packable()
            vision = VisionInputs(images, image_sizes, modalities)
            spliced = self._splice(input_ids, attention_mask, labels, vision)
            row = pack(spliced, max_length=LlavaSettings.from_hf(self.config).max_length)
            with self._attention(output_attentions):  # which decides the mask
                attention_mask, boundaries = packed_arguments(self.config, row)
            input_ids, inputs_embeds, labels, position_ids = None, row.embeds, row.labels, row.positions
            lengths = row.lengths
            use_cache = False  # with a cache, transformers would not look for positions that restart
            kwargs |= boundaries
        elif inputs_embeds is None and input_ids is not None:
            if images is None and input_ids.shape[1] > 1:
                self._refuse_image_tokens_without_images(input_ids)
            (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels) = self._prepare(
                input_ids, position_ids, attention_mask, past_key_values, labels,
                vision=VisionInputs(images, image_sizes, modalities),
            )  # fmt: skip
            if (
                position_ids is None
                and attention_mask is not None
                and LlavaSettings.from_hf(self.config).padding_side == "left"
            ):
                # Models with absolute positions would otherwise count the padding before a row.
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        asked = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        kwargs |= {name: value for name, value in asked.items() if value is not None}
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if (
            past_key_values is not None
        ):  # transformers 5.24 calls it `cache`, and warns of the old name even where it is None
            kwargs["past_key_values"] = past_key_values
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        if loss_only and labels is not None and not output_attentions and self.can_fuse_loss():
            return self._forward_to_loss(labels, loss_rule, lengths, **kwargs)
        if packed and labels is not None:
            labels = labels.to(row.embeds.device)
        if labels is None or loss_rule == TOKEN_MEAN:
            with self._attention(output_attentions):
                return super().forward(labels=labels, **kwargs)
        with self._attention(output_attentions):
            output = super().forward(**kwargs)
        output.loss = mean_loss(output.logits, labels, loss_rule, lengths=lengths) + router_loss(self.config, output)
        return output

    def _attention(self, output_attentions: bool | None) -> AbstractContextManager[None]:
        """Within the block, the model computes attention weights, if they are asked for."""
        return eager_attention(self.config) if output_attentions else nullcontext()

    def can_fuse_loss(self) -> bool:
        """Whether the loss can be computed without the logits (loss.py)."""
        kind = language_model_type({"model_type": self.config.model_type})
        return kind in PLAIN_DECODERS and can_fuse(self.get_output_embeddings())

    def _forward_to_loss(
        self, labels: Tensor, rule: LossRule, lengths: Sequence[int] | None, **arguments: Any
    ) -> CausalLMOutputWithPast:
        """Compute the mean loss over trained tokens without logits."""
        hidden = self.get_model()(**arguments).last_hidden_state
        head = self.get_output_embeddings()
        total, num_trained = next_token_loss(head, hidden, labels, rule=rule, lengths=lengths)
        # A batch whose answers were all truncated has the loss 0 on every rank, not NaN.
        return CausalLMOutputWithPast(loss=total / max(num_trained, 1))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Pixels = None,
        image_sizes: Sizes = None,
        modalities: Modalities = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate for prompts with images, and return the new tokens only.

        Args:
            inputs: (B, L) with -200 for each image; `input_ids` is another name for it. Rows are padded on the left
                whatever the config says, since new tokens follow the end of a row.
            images: Pixels, as `image_features` takes them, with their `image_sizes` and `modalities`.
            **kwargs: Those of transformers' `generate`, except `inputs_embeds`. `output_attentions` is computed by eager
                attention.
        """
        vision = VisionInputs(images, image_sizes, modalities)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if "inputs_embeds" in kwargs:
            raise InputError(
                "generate takes token ids and images, not inputs_embeds; call the language model for those"
            )
        if input_ids is None:
            raise InputError("generate needs token ids as its first argument")
        kwargs.pop("position_ids", None)  # transformers computes them from the mask
        if not kwargs.get("do_sample", True):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k")}
        input_ids = input_ids.to(self.device)
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = self._padding_mask(input_ids, kwargs)
        attention_mask = attention_mask.to(self.device)
        if self.replaces_prepare:
            embeds, mask = self._prepare_by_replacement(input_ids, attention_mask, vision)
        else:
            batch = self._splice_batch(input_ids, attention_mask, None, vision, side="left")
            embeds, mask = batch.embeds, batch.mask
        with self._attention(kwargs.get("output_attentions")):
            return super().generate(inputs_embeds=embeds, attention_mask=mask.long(), **kwargs)

    def _prepare_by_replacement(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: VisionInputs,
    ) -> tuple[Tensor, Tensor]:
        """Call a replaced `prepare_inputs_labels_for_multimodal` for `generate`, as `forward` calls it.

        Returns:
            Embeddings (B, T, D) and their mask (B, T), with the padding of each row on the left.
        """
        if vision.images is None:
            self._refuse_image_tokens_without_images(input_ids)
        ids, _, mask, _, embeds, _ = self._prepare(input_ids, None, attention_mask, None, None, vision=vision)
        if embeds is None:
            embeds = self._embed(input_ids if ids is None else ids)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask.to(embeds.device)
        order = mask.bool().long().argsort(dim=1, stable=True)  # padding first, the rest in its order
        return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)

    def _prepare(self, *before: Any, vision: VisionInputs) -> tuple[Any, ...]:
        """Call `prepare_inputs_labels_for_multimodal`, or what replaces it, which may know no modalities."""
        images, sizes, modalities = vision
        known = inspect.signature(self.prepare_inputs_labels_for_multimodal).parameters.values()
        names = {parameter.name for parameter in known}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
        if modalities is not None and "video" in modalities and not (takes_any or "modalities" in names):
            raise InputError("the prepare_inputs_labels_for_multimodal that was set for this model takes no videos")
        if not (takes_any or "image_sizes" in names):
            return self.prepare_inputs_labels_for_multimodal(*before, images, sizes)
        named = {"modalities": modalities} if modalities is not None and (takes_any or "modalities" in names) else {}
        return self.prepare_inputs_labels_for_multimodal(*before, images, image_sizes=sizes, **named)

    def _padding_mask(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Infer the mask as transformers does: padding is a pad token that is not also an end token; a single row has none."""
        config: GenerationConfig = kwargs.get("generation_config") or self.generation_config
        pad_id = kwargs.get("pad_token_id", config.pad_token_id)
        ends = kwargs.get("eos_token_id", config.eos_token_id)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if len(input_ids) == 1 or pad_id is None or pad_id in ends:
            return torch.ones_like(input_ids)
        return input_ids.ne(pad_id).long()

    def _refuse_image_tokens_without_images(self, input_ids: Tensor) -> None:
        lowest = int(input_ids.min()) if input_ids.numel() else 0
        if lowest < 0:
            raise InputError(f"the prompt has an <image> placeholder (id {lowest}), but no images were given")

    def initialize_vision_tokenizer(self, model_args: VisionArguments, tokenizer: Tokenizer) -> None:
        """Add the image tokens that training asks for and initialise their embeddings."""
        add_image_tokens(self, model_args, tokenizer)


# What `prepare_inputs_labels_for_multimodal` is where nothing replaced it.
OWN_PREPARE = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
