"""Describe a checkpoint from headers and small files, without loading weights or importing torch.

In: a model folder in any layout, or a GGUF file. Out: `CheckpointDescription`, which info.py prints. Parts that the model
needs and this disk lacks are listed as missing; a folder that is no checkpoint is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.conversation import get_model_name_from_path
from llava.convert.readers import readers_of
from llava.errors import InputError
from llava.files import holds_tokenizer, read_json
from llava.images.image_processor import ClipImageProcessor, check_side
from llava.images.layout import ImagePolicy, TileRange, parse_pinpoints
from llava.model.checkpoints.base_model import base_on_disk, find_base, original_config, over_base
from llava.model.checkpoints.catalog import did_you_mean
from llava.model.checkpoints.foreign import ForeignModel
from llava.model.checkpoints.gguf.file import GgufHeader, read_gguf_header
from llava.model.checkpoints.gguf.folder import find_pair, gguf_checkpoint
from llava.model.checkpoints.hf_layout import NORM_PROJECTOR
from llava.model.checkpoints.hub import HubOptions, find_vision_tower, is_gguf, is_known_name, resolve_checkpoint
from llava.model.checkpoints.inspect import (
    ADAPTER_CONFIG,
    PROJECTOR_INFIX,
    TOWER_INFIX,
    VOCABULARY,
    CheckpointInfo,
    folders_of,
    survey,
    tower_headers,
)
from llava.model.checkpoints.weight_files import TensorHeader
from llava.model.config import (
    LEARNED_ENDS,
    OWN_FOLDER,
    LlavaSettings,
    check_tower_type,
    check_types,
    unused_settings,
)
from llava.model.template_defaults import choose_template, declared_context_len

BYTES_PER_NUMBER = {"float32": 4.0, "bfloat16 or float16": 2.0, "8-bit": 1.0, "4-bit": 0.5625}


@dataclass(frozen=True)
class CheckpointDescription:
    """What `llava info` shows; `facts` by their labels, `missing` as sentences, `readers` by program."""

    path: str
    layout: str
    facts: Mapping[str, object]
    parameters: Mapping[str, int]
    stored_bytes: Mapping[str, int]  # bytes on the disk by dtype
    memory_bytes: Mapping[str, int]  # bytes of weights once loaded, by dtype
    missing: tuple[str, ...] = ()
    readers: Mapping[str, str] = field(default_factory=dict)


def describe_checkpoint(
    path: str | Path, base: str | Path | None = None, *, mmproj: str | Path | None = None
) -> CheckpointDescription:
    """Describe a model folder, a GGUF file or a folder of GGUF files on this disk.

    Args:
        path: The folder or file.
        base: The base model of an adapter or projector; None looks for the one that the folder's files name.
        mmproj: For a GGUF file, the one with its tower and projector; None looks for it beside the other.
    """
    place = Path(path).expanduser()
    if mmproj is not None or is_gguf(place):
        return _describe_gguf(place, None if mmproj is None else Path(mmproj).expanduser())
    if is_known_name(str(path)):
        place = resolve_checkpoint(path, hub=HubOptions(local_files_only=True))
    if not place.is_dir():
        meant = did_you_mean(str(path)) or ";"
        raise InputError(
            f"there is no model folder or .gguf file {str(path)!r}{meant} llava info looks at what is on this disk"
        )
    found = survey(place)
    return _describe_foreign(found, found.foreign) if found.foreign is not None else _Folder(found, base).describe()


class _Folder:
    """A model folder; each method finds out one fact."""

    def __init__(self, found: CheckpointInfo, base: str | Path | None = None) -> None:
        self.base = _base_on_disk(found) if base is None else find_base(found, base)
        self.info = info = over_base(found, self.base)
        self.folder = info.folder
        self.values = original_config(info)
        self.settings = LlavaSettings.from_hf(SimpleNamespace(**self.values)) if info.is_multimodal else None
        self.stores_tower = info.tower_in_checkpoint or (self.base is not None and self.base.tower_in_checkpoint)
        self.tower_folder = self._find_tower()
        self.tower = {key: value for key, value in self._tower_config().items() if value is not None}
        self._check_image_processor()

    def _find_tower(self) -> Path | None:
        """The vision tower's folder, if it is on this disk."""
        name = self.settings.vision.tower if self.settings else None
        if name is None or name == OWN_FOLDER:
            return None
        found = (find_vision_tower(name, checkpoint_folder=folder) for folder in folders_of(self.info, self.base))
        return next((place for place in found if place is not None), None)

    def _tower_config(self) -> dict[str, Any]:
        if isinstance(self.values.get("vision_config"), Mapping):
            return dict(self.values["vision_config"])
        if self.tower_folder is None:
            return {}
        values = read_json(self.tower_folder / "config.json")
        check_types(values, self.tower_folder / "config.json")
        return dict(values.get("vision_config") or values)

    def _check_image_processor(self) -> None:
        side = self.tower.get("image_size")
        if self.tower and self.settings is not None:
            check_tower_type(self.tower.get("model_type"), self.settings.vision.tower)
        if side is None or self.settings is None or self.settings.vision.s2_scales:
            return
        folder = self.tower_folder or self.info.config_folder
        check_side(ClipImageProcessor.from_pretrained(folder, vision_config=self.tower), side, folder)

    # Tensors

    def headers(self) -> dict[str, TensorHeader]:
        own = {**self.info.tensors, **self.info.extras}
        return {**self.base.tensors, **self.base.extras, **own} if self.base is not None else own

    def parameters(self) -> dict[str, int]:
        headers = self.headers()
        stored_tower = [h for name, h in headers.items() if TOWER_INFIX in name]
        tower = _count(stored_tower)
        if not self.stores_tower and self.tower_folder is not None and _holds_weights(self.tower_folder):
            tower = _count(tower_headers(self.tower_folder).values())
        parts = {
            "language model": _count(h for n, h in headers.items() if TOWER_INFIX not in n and not _is_added(n)),
            "projector": _count(h for n, h in headers.items() if _is_added(n)),
            "vision tower": tower,
            "adapter": _count(self.info.adapter.values()),
        }
        return {name: count for name, count in parts.items() if count}

    def memory(self) -> dict[str, int]:
        """The bytes of the weights by dtype; quantized models keep tower, projector and embeddings in 16 bits."""
        parameters = self.parameters()
        total = sum(count for name, count in parameters.items() if name != "adapter")
        layers = sum(h.num_elements for n, h in self.headers().items() if _is_quantized(n, h))
        if not layers:
            return {}
        return {
            name: int(total * size if size >= 2 else layers * size + (total - layers) * 2)
            for name, size in BYTES_PER_NUMBER.items()
        }

    # Facts

    def describe(self) -> CheckpointDescription:
        facts = {
            "kind": self._kind(),
            "language model": self._language_model(),
            **(self._multimodal_facts(self.settings) if self.settings is not None else {}),
            "settings not used": unused_settings(self.values),
            "added tokens": self._added_tokens(),
            "context": declared_context_len(self.values),
            "adapter": self._adapter(),
        }
        return CheckpointDescription(
            path=str(self.folder),
            layout=self.info.kind,
            facts={key: value for key, value in facts.items() if value},
            parameters=self.parameters(),
            stored_bytes=_stored(self.info),
            memory_bytes=self.memory(),
            missing=tuple(self._missing()),
            readers=self._readers() | self._unready(),
        )

    def _multimodal_facts(self, settings: LlavaSettings) -> dict[str, str]:
        name = get_model_name_from_path(str(self.folder.absolute()))
        template = choose_template(self.values, name, folder=self._tokenizer_folder(), has_token=self._has_token)
        wide = f"{self.values.get('mm_hidden_size')} to {self.values.get('hidden_size') or self.values.get('d_model')}"
        return {
            "vision tower": self._tower(settings),
            "projector": f"{settings.projector.type}, {wide}",
            "images": self._images(settings),
            "videos": self._videos(settings),
            "template": template.name,
            "template from": template.origin,
        }

    def _kind(self) -> str:
        if self.settings is None and self.info.kind == "lora":
            return "an adapter for a base model"
        if self.settings is None:
            return "a language model without a vision tower"
        kinds = {
            "full": "a whole model in the original layout",
            "projector": "a projector for a base model",
            "lora": "an adapter for a base model",
            "transformers": f"a whole model in the layout of {(self.info.config.get('architectures') or ['?'])[0]}",
        }
        return f"{kinds[self.info.kind]} ({self._generation(self.settings)})"

    def _generation(self, settings: LlavaSettings) -> str:
        """The generation of published models that are built like this one; the name is not considered."""
        if self.info.has_legacy_config and self.info.config.get("mm_projector_type") is None:
            return "as LLaVA v0 and v1"
        if settings.projector.type == NORM_PROJECTOR:
            return "as ViP-LLaVA"
        if settings.image.max_tiles is not None:
            return "as LLaVA-Video" if settings.video.newline == "grid" else "as LLaVA-OneVision"
        if settings.video.before_projector:
            return "as LLaVA-NeXT-Video"
        if settings.image.mode == "anyres":
            return "as LLaVA-1.6 (NeXT)"
        return "as LLaVA-1.5" if settings.projector.type == "mlp2x_gelu" else "as LLaVA v1"

    def _language_model(self) -> str:
        values = self.values
        sizes = [
            f"{values[key]} {what}"
            for key, what in (
                ("num_hidden_layers", "layers"),
                ("hidden_size", "wide"),
                ("num_attention_heads", "heads"),
                ("vocab_size", "vocabulary rows"),
            )
            if values.get(key) is not None
        ]
        return ", ".join([self.info.language_model, *sizes])

    def _tower(self, settings: LlavaSettings) -> str:
        name = settings.vision.tower
        if self.info.tower_in_checkpoint:
            where = "weights in this checkpoint"
        elif self.stores_tower and self.base is not None:
            where = f"weights in the base {self.base.folder}"
        elif self.tower_folder is not None:
            where = f"weights in {self.tower_folder}"
        else:
            where = f"{name}, not on this disk"
        kind = self.tower.get("model_type")
        sizes = f"{kind}, {self.tower.get('image_size')} pixels in patches of {self.tower.get('patch_size')}"
        feature = f"layer {settings.vision.select_layer}, {settings.vision.select_feature}"
        return "; ".join([*([sizes] if kind else []), where, feature])

    def _images(self, settings: LlavaSettings) -> str:
        image = settings.image
        modes = {
            "square": "middle cut out",
            "pad": "padded to a square",
            "anyres": "an overview and tiles",
            "highres": "padded to a square, an overview and tiles",
            "crop_split": "middle cut out, tiles",
        }
        text = modes[image.mode]
        if "image_size" in self.tower and "patch_size" in self.tower:
            side = self.tower["image_size"]
            policy = ImagePolicy(
                image.mode, side, self.tower["patch_size"], parse_pinpoints(image.pinpoints, side), image.merge,
                cls_token=settings.vision.select_feature == "cls_patch", max_tiles=image.max_tiles,
                pools=image.pools, keeps_overview=image.keeps_overview, crop_split=image.crop_split,
            )  # fmt: skip
            text += f", {policy.features_per_tile} tokens {'a tile' if policy.cuts_tiles else 'each'}"
            if image.max_tiles is not None:
                text += f", reduced to those of {image.max_tiles} tiles and the overview"
        if isinstance(image.pinpoints, TileRange):
            text += f", canvases of {image.pinpoints} tiles"
        elif image.pinpoints:
            text += ", canvases " + " ".join(f"{size.width}x{size.height}" for size in image.pinpoints)
        return text

    def _videos(self, settings: LlavaSettings) -> str:
        """How a video's frames are reduced; empty where the config does not say, as of models that learned images alone."""
        if not any(self.values.get(key) is not None for key in ("mm_spatial_pool_mode", "mm_newline_position")):
            return ""
        video = settings.video
        ends = {
            "grid": "a newline after each row",
            "frame": "a newline after each frame",
            "one_token": "a newline at the end",
            "no_token": "no newline",
        }
        place = " before the projector" if video.before_projector else ""
        text = f"frames reduced {video.stride} times each way ({video.pool}){place}, {ends[video.newline]}"
        return text if video.slow_every is None else f"{text}, more between every {video.slow_every} frames"

    def _tokenizer_folder(self) -> Path | None:
        return next((folder for folder in folders_of(self.info, self.base) if holds_tokenizer(folder)), None)

    def _has_token(self, text: str) -> bool:
        """Whether the tokenizer's files have a token of this text."""
        home = self._tokenizer_folder()
        names = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
        files = [home / name for name in names] if home is not None else []
        return any(json.dumps(text) in file.read_text(encoding="utf-8") for file in files if file.is_file())

    def _added_tokens(self) -> list[str]:
        tokens: dict[int, str] = {}
        home = self._tokenizer_folder()
        if home is not None:
            for name, read in _ADDED_TOKENS.items():
                if (home / name).is_file():
                    tokens |= read(read_json(home / name))
        return [tokens[index] for index in sorted(tokens)]

    def _adapter(self) -> str | None:
        config = self.info.adapter_config
        if config is None:
            return None
        modules = config.get("target_modules") or []
        where = f"modules named {modules}" if isinstance(modules, str) else f"{len(modules)} kinds of modules"
        return f"rank {config.get('r')}, alpha {config.get('lora_alpha')}, on {where}"

    def _missing(self) -> Iterable[str]:
        if self.info.needs_base and self.base is None:
            named = f" (its files name {self.info.base_hint})" if self.info.base_hint else ""
            yield f"the base model{named}; give its folder with --model-base"
        if self.settings is not None and not self.stores_tower:
            if self.tower_folder is None:
                yield f"the vision tower {self.settings.vision.tower!r}, which loading looks for on the hub"
            elif not _holds_weights(self.tower_folder):
                yield f"the vision tower's weights in {self.tower_folder}"
        if self._tokenizer_folder() is None and (self.base is not None or not self.info.needs_base):
            yield "a tokenizer (tokenizer.model, tokenizer.json or vocab.json)"
        if (
            self.settings is not None
            and self.info.kind == "full"
            and not any(_is_added(name) for name in self.headers())
        ):
            yield "the projector's weights"

    def _unready(self) -> dict[str, str]:
        """What keeps the folder from being loaded as it is; a tower or a base may be found on the hub."""
        lacks = [
            sentence for sentence in self._missing() if "on the hub" not in sentence and "base model" not in sentence
        ]
        return {"llava": f"no: it lacks {lacks[0]}"} if lacks else {}

    def _readers(self) -> dict[str, str]:
        """Which programs read this folder as it is, and which conversion the others need."""
        return readers_of(self.info, self.settings, tower_type=self._tower_type(), tower_folder=self.tower_folder)

    def _tower_type(self) -> str | None:
        """The type of the vision tower, as far as its config is on this disk."""
        if self.tower_folder is None or not (self.tower_folder / "config.json").is_file():
            return None
        return str(read_json(self.tower_folder / "config.json").get("model_type"))


def _base_on_disk(info: CheckpointInfo) -> CheckpointInfo | None:
    """The base that the folder's files name, if it is on this disk."""
    place = base_on_disk(info) if info.needs_base else None
    names = ("config.json", ADAPTER_CONFIG)
    return find_base(info, place) if place is not None and any((place / name).is_file() for name in names) else None


_ADDED_TOKENS = {
    "added_tokens.json": lambda values: {index: token for token, index in values.items() if isinstance(index, int)},
    "tokenizer_config.json": lambda values: {
        int(index): str(token.get("content"))
        for index, token in (values.get("added_tokens_decoder") or {}).items()
        if isinstance(token, dict)
    },
    "tokenizer.json": lambda values: {
        int(token["id"]): str(token["content"]) for token in values.get("added_tokens") or [] if isinstance(token, dict)
    },
}


def _stored(info: CheckpointInfo) -> dict[str, int]:
    """The bytes of a folder's tensors by dtype."""
    sizes: Counter[str] = Counter()
    for header in (*info.tensors.values(), *info.extras.values(), *info.adapter.values()):
        for part in header.stored:
            sizes[part.dtype] += part.num_bytes
    return dict(sizes.most_common())


def _count(headers: Iterable[TensorHeader]) -> int:
    return sum(header.num_elements for header in headers)


def _is_added(name: str) -> bool:
    return PROJECTOR_INFIX in name or name.endswith(LEARNED_ENDS)


def _is_quantized(name: str, header: TensorHeader) -> bool:
    """Whether 4-bit and 8-bit quantization applies to a tensor, a matrix of the language model's layers."""
    table = VOCABULARY.search(name) is not None
    return len(header.shape) == 2 and TOWER_INFIX not in name and not _is_added(name) and not table


def _holds_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def _describe_foreign(info: CheckpointInfo, model: ForeignModel) -> CheckpointDescription:
    """Describe a model that is not read by the sentence with which every command refuses it."""
    return CheckpointDescription(
        path=str(info.folder),
        layout="foreign",
        facts={"kind": model.name},
        parameters={"all": _count(info.tensors.values())} if info.tensors else {},
        stored_bytes=_stored(info),
        memory_bytes={},
        readers={"llava": f"no: {model.sentence(info.folder)}"},
    )


def _describe_gguf(place: Path, mmproj: Path | None) -> CheckpointDescription:
    """Describe a pair of GGUF files as the checkpoint that is loaded of them; where that is refused, what their headers say."""
    try:
        files: Sequence[Path] = find_pair(place, mmproj)
        missing: tuple[str, ...] = ()
    except InputError as error:
        files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
        missing = (str(error),)
    heads = [read_gguf_header(file) for file in files]
    command = "yes: llama-mtmd-cli -m MODEL --mmproj MMPROJ --jinja --image IMAGE -p QUESTION"
    readers = {"llava": "no", "llama.cpp": "with the other file of the pair" if missing else command}
    facts: dict[str, object] = dict(_gguf_facts(head) for head in heads)
    stored: Counter[str] = Counter()
    for tensor in (tensor for head in heads for tensor in head.tensors.values()):
        stored[tensor.kind] += tensor.num_bytes or 0
    if not missing:
        try:
            whole = _Folder(survey(gguf_checkpoint(*files))).describe()
        except InputError as error:
            readers["llava"] = f"no: {error}"
        else:
            facts |= {**whole.facts, "kind": f"a pair of GGUF files, read as {whole.facts['kind']}"}
            readers |= {"llava": "yes", "transformers, vLLM": "after llava convert --to transformers"}
            return replace(
                whole,
                path=str(place),
                layout="gguf",
                facts=facts,
                stored_bytes=dict(stored),
                missing=(),
                readers=readers,
            )
    parameters = {_part(head): head.num_parameters for head in heads}
    return CheckpointDescription(str(place), "gguf", facts, parameters, dict(stored), {}, missing, readers)


def _part(head: GgufHeader) -> str:
    return "tower and projector" if head.architecture == "clip" else "language model"


def _gguf_facts(head: GgufHeader) -> tuple[str, str]:
    """A GGUF file's name, and what its header says in a line."""
    is_vision = head.architecture == "clip"
    prefix = "clip.vision" if is_vision else head.architecture
    sizes = f"{head.keys.get(f'{prefix}.block_count')} layers, {head.keys.get(f'{prefix}.embedding_length')} wide"
    what = "vision tower and projector" if is_vision else f"language model, {head.architecture}"
    return head.file.name, f"{what}, {sizes}"


def as_json(description: CheckpointDescription) -> str:
    """Format a description as a JSON object, keyed by its fields."""
    return json.dumps(asdict(description), indent=2, ensure_ascii=False)
