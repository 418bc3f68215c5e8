"""Resize, crop and normalise images to the pixels that a CLIP or SigLIP tower expects.

In: Pillow images (or uint8 arrays) and a `preprocessor_config.json`. Out: normalised float32 arrays or tensors. It uses
Pillow and numpy, so that pixels are the same on every machine: transformers chooses a backend by what is installed, and
its backends give different pixels. Images are cut into tiles in mm_utils.py, on a GPU in gpu_preprocess.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llava.errors import InputError
from llava.files import read_json
from llava.images.decode import to_rgb

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from transformers import PreTrainedConfig

    ImageInput: TypeAlias = Image.Image | np.ndarray
    VisionConfig: TypeAlias = PreTrainedConfig | Mapping[str, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE = 2**14  # pixels
BICUBIC, BILINEAR = 3, 2  # Pillow's numbers, as config files spell them

# Defaults for what a config file leaves out, by the class that it names. transformers' own LLaVA processors are CLIP's
# with keys about tiles; here the model's config decides about those.
_CLIP: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
_EXACT: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": HALF,
    "image_std": HALF,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP,
    "SiglipImageProcessor": _EXACT,
    "LlavaOnevisionImageProcessor": _EXACT | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "ViTImageProcessor": _EXACT | {"resample": BILINEAR},
    "BitImageProcessor": _CLIP,
    "Siglip2ImageProcessor": _EXACT | {"resample": BILINEAR},
    "DINOv3ViTImageProcessor": _EXACT | {"resample": BILINEAR, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    "ConvNextImageProcessor": _EXACT,
}
# The class for a vision config that came without a processor file, by its model_type.
TOWER_IMAGE_PROCESSORS = {
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "siglip2_vision_model": "Siglip2ImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "aimv2_vision_model": "CLIPImageProcessor",
    "mlcd_vision_model": "CLIPImageProcessor",
    "convnext": "ConvNextImageProcessor",
}


def read_processor_config(folder: Path) -> dict[str, Any] | None:
    """The image processor's settings in a folder; newer transformers write them inside those of the whole processor."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    file = folder / "processor_config.json"
    nested = read_json(file).get("image_processor") if file.is_file() else None
    return nested if isinstance(nested, dict) else None


# What a field may hold, by its declared type.
FIELD_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "dict": ("an object", Mapping),
    "bool": ("true or false", bool),
    "int": ("a whole number", int),
    "float": ("a number", (int, float)),
    "tuple": ("a list", (list, tuple)),
    "str": ("a name", str),
}


class PixelBatch(dict):
    """A dict with "pixel_values" whose entries are attributes too, like transformers' `BatchFeature`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: object, **kwargs: object) -> PixelBatch:
        """Move or cast the tensors, as `Tensor.to` does."""
        return PixelBatch({key: value.to(*args, **kwargs) for key, value in self.items()})


class ImageProcessor(Protocol):
    """What the package asks of any image processor, its own or one of transformers."""

    @property
    def size(self) -> Mapping[str, int]: ...
    @property
    def crop_size(self) -> Mapping[str, int]: ...
    @property
    def image_mean(self) -> Sequence[float]: ...
    def __call__(self, images: Sequence[Image.Image], return_tensors: str | None = None) -> PixelBatch: ...
    def preprocess(self, images: Sequence[Image.Image], return_tensors: str | None = None) -> PixelBatch: ...


@dataclass(frozen=True)
class ClipImageProcessor:
    """Resize, centre crop, rescale and normalise; the field names are those of `preprocessor_config.json`."""

    size: dict[str, int] = field(default_factory=lambda: {"shortest_edge": 224})  # or {"height", "width"}
    crop_size: dict[str, int] = field(default_factory=lambda: {"height": 224, "width": 224})
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True
    resample: int = BICUBIC
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    image_processor_type: str = "CLIPImageProcessor"
    extra: dict[str, Any] = field(default_factory=dict)  # unused keys of a file, written back as read

    model_input_names = ("pixel_values",)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            words, kind = FIELD_TYPES[str(item.type).partition("[")[0]]
            if not isinstance(value, kind) or (isinstance(value, bool) and item.type != "bool"):
                raise InputError(f"{item.name} {value!r} of an image processor is not {words}.")
        if set(self.size) not in ({"shortest_edge"}, {"height", "width"}) or not _are_sides(self.size.values()):
            raise InputError(
                f"size {self.size!r} of an image processor is neither a shortest_edge nor height and width."
            )
        if set(self.crop_size) != {"height", "width"} or not _are_sides(self.crop_size.values()):
            raise InputError(f"crop_size {self.crop_size!r} of an image processor is not a height and a width.")
        for name in ("image_mean", "image_std"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
                raise InputError(f"{name} {values!r} of an image processor is not three numbers, one per colour.")
            object.__setattr__(self, name, values)
        if 0 in self.image_std:
            raise InputError(f"image_std {self.image_std!r} of an image processor holds a zero.")
        if self.resample not in range(6):
            raise InputError(f"resample {self.resample!r} of an image processor is not one of Pillow's filters 0 to 5.")

    # -- configuration ------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: object) -> ClipImageProcessor:
        """Read a parsed `preprocessor_config.json`, sizes as numbers (old files) or as dicts (new ones)."""
        values = {key: value for key, value in {**config, **overrides}.items() if value is not None}
        kind = _known_class(values.pop("image_processor_type", None) or values.pop("feature_extractor_type", None))
        values.pop("feature_extractor_type", None)
        if kind == "ConvNextImageProcessor" and "crop_size" not in values:
            values |= _convnext_sizes(values.get("size", 384), values.get("crop_pct", 224 / 256))
        values = {**DEFAULTS[kind], **values, "image_processor_type": kind}
        exact = set(DEFAULTS[kind]["size"]) == {"height", "width"}
        values["size"] = _size_dict(values["size"], exact=exact)
        # Outside code reads the tower's input size from crop_size, even where nothing is cropped.
        crop = values.get("crop_size", values["size"])
        side = crop.get("shortest_edge") if isinstance(crop, Mapping) else None
        values["crop_size"] = _size_dict(side or crop, exact=True)
        known = {item.name for item in fields(cls)} - {"extra"}
        extra = values.pop("extra", {})
        if not isinstance(extra, Mapping):
            raise InputError(f"extra {extra!r} of an image processor is not an object.")
        extra = {**extra, **{key: value for key, value in values.items() if key not in known}}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    @classmethod
    def from_vision_config(cls, config: VisionConfig) -> ClipImageProcessor:
        """Make the usual processor for a vision tower of which only the config (object or dict) is known."""
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        values = values.get("vision_config") or values
        if "image_size" not in values:
            raise InputError("a vision config without image_size does not say how large its images are.")
        kind = TOWER_IMAGE_PROCESSORS.get(values.get("model_type", "clip"))
        if kind is None:
            raise InputError(
                f"there is no preprocessor_config.json, and no usual one for model_type {values['model_type']!r}; "
                f"known: {', '.join(TOWER_IMAGE_PROCESSORS)}."
            )
        side = values["image_size"]
        return cls.from_dict({"image_processor_type": kind, "size": side, "crop_size": side})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, vision_config: VisionConfig | None = None, **overrides: object
    ) -> ClipImageProcessor:
        """Read the processor of a model folder, or a processor file; `overrides` replace fields of the file.

        Without a processor file, `vision_config` decides in place of the folder's config.json.
        """
        path = Path(folder)
        config = read_json(path) if path.is_file() else read_processor_config(path)
        if config is not None:
            return cls.from_dict(config, **overrides)
        if vision_config is None and (path / "config.json").is_file():
            vision_config = read_json(path / "config.json")
        if vision_config is None:
            raise InputError(f"{str(folder)!r} holds neither preprocessor_config.json nor config.json.")
        return cls.from_dict(cls.from_vision_config(vision_config).to_dict(), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, which transformers reads too."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
        return json.loads(json.dumps({**self.extra, **own}))  # a copy that shares no dict with this object

    def save_pretrained(self, folder: str | Path, **_: object) -> list[str]:
        """Write `preprocessor_config.json` into a folder, which is created where it is absent."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        path = target / "preprocessor_config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [str(path)]

    def with_side(self, side: int) -> ClipImageProcessor:
        """A copy for images of another size, which towers of several scales need."""
        key = {"shortest_edge": side} if "shortest_edge" in self.size else {"height": side, "width": side}
        return replace(self, size=key, crop_size={"height": side, "width": side})

    # -- pixels -------------------------------------------------------------------------------------------------------

    def preprocess(
        self, images: ImageInput | Sequence[ImageInput], return_tensors: str | None = None, **overrides: object
    ) -> PixelBatch:
        """Make the pixels of one image or of several.

        Args:
            images: a Pillow image, a uint8 array, or a list of them.
            return_tensors: "np" or "pt" for one array or tensor (N, 3, H, W); None for a list of arrays (3, H, W).
            overrides: fields with other values for this call: `preprocess(image, do_center_crop=False)`.
        """
        processor = self._overridden(overrides) if overrides else self
        table = processor.table()
        pixels = [processor._pixels(image, table) for image in _image_list(images)]
        if return_tensors is None:
            return PixelBatch(pixel_values=pixels)
        if return_tensors not in ("pt", "np"):
            raise InputError(f"return_tensors is {return_tensors!r}; known: 'pt', 'np' or None.")
        shapes = {array.shape for array in pixels}
        if len(shapes) != 1:
            raise InputError(
                f"{len(pixels)} images of shapes {sorted(shapes)} do not stack into one batch; "
                "give at least one image, and keep do_center_crop on."
            )
        import numpy as np

        batch = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
        if return_tensors == "np":
            return PixelBatch(pixel_values=batch)
        import torch

        return PixelBatch(pixel_values=torch.from_numpy(batch))

    __call__ = preprocess

    def _overridden(self, overrides: Mapping[str, object]) -> ClipImageProcessor:
        known = {item.name for item in fields(self)} - {"extra", "image_processor_type"}
        unknown = set(overrides) - known
        if unknown:
            raise InputError(f"an image processor has no option {min(unknown)!r}; known: {', '.join(sorted(known))}.")
        given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
        if "size" in given:
            given["size"] = _size_dict(given["size"], exact="shortest_edge" not in self.size)
        if "crop_size" in given:
            given["crop_size"] = _size_dict(given["crop_size"], exact=True)
        return replace(self, **given)

    def _pixels(self, image: ImageInput, table: np.ndarray) -> np.ndarray:
        """One image as an array (3, height, width)."""
        import numpy as np

        rgb = _as_rgb(image, convert=self.do_convert_rgb)
        if self.do_resize:
            target = resized(rgb.size, self.size)
            if target != rgb.size:
                rgb = rgb.resize(target, resample=self.resample)
        if self.do_center_crop:
            width, height = self.crop_size["width"], self.crop_size["height"]
            left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
            if (left, top) != (0, 0) or rgb.size != (width, height):
                rgb = rgb.crop((left, top, left + width, top + height))  # outside the image: black
        values = np.asarray(rgb)
        pixels = np.empty((3, rgb.height, rgb.width), dtype=table.dtype)
        for channel in range(3):
            np.take(table[channel], values[..., channel], out=pixels[channel], mode="clip")
        return pixels

    def table(self) -> np.ndarray:
        """The pixel value (3, 256) that each byte becomes in each colour channel.

        As in the processors that weights were trained with, rescaling is done in double precision and rounded, the rest
        in single precision. A table gives the same bits as computing every pixel, and is faster.
        """
        import numpy as np

        values: np.ndarray = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        if self.do_rescale:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)[:, None]
            std = np.array(self.image_std, dtype=np.float32)[:, None]
            values = (values.astype(np.float32) - mean) / std
        return values


def _as_rgb(image: ImageInput, *, convert: bool) -> Image.Image:
    """Convert a Pillow image of any mode, or a uint8 array (H, W), (H, W, 3) or (3, H, W), to RGB."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        return Image.fromarray(_hwc(image))
    if image.mode != "RGB" and not convert:
        raise InputError(f"an image of mode {image.mode} is not RGB, and do_convert_rgb is off.")
    return to_rgb(image)


def _hwc(image: np.ndarray) -> np.ndarray:
    import numpy as np

    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise InputError(f"an image is an array of {array.dtype}; give uint8 values from 0 to 255, or a Pillow image.")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"an image is an array of shape {np.shape(image)}; give (height, width, 3).")
    return np.ascontiguousarray(array)


def _image_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """List one image or many; an array of four dimensions holds many (the frames of a video)."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4:
        return list(images)
    if images is None or isinstance(images, (str, bytes, Path)):
        raise InputError(
            f"an image processor takes images, not {images!r}; open it with llava.images.io.load_image first."
        )
    return [images]


def check_side(processor: ClipImageProcessor, side: int, source: object) -> None:
    """Check that an image processor makes the pixels that a tower takes.

    Args:
        processor: The processor of the tower.
        side: Pixels per side that the tower takes.
        source: The folder of the processor, for the error.

    Raises:
        InputError: It crops or resizes to another size.
    """
    exact = processor.do_resize and "height" in processor.size
    made = processor.crop_size if processor.do_center_crop else processor.size if exact else None
    if made is not None and set(made.values()) != {side}:
        raise InputError(
            f"the image processor of {source} makes images of {made['width']} x {made['height']} pixels, and the vision tower "
            f"takes {side} x {side}; copy its config.json and preprocessor_config.json again, so that they agree."
        )


def overview_side(processor: ImageProcessor) -> int:
    """Pixels per side of the square that a whole image is squeezed to before its tiles."""
    return processor.size["shortest_edge" if "shortest_edge" in processor.size else "height"]


def mean_colour(processor: ImageProcessor) -> tuple[int, int, int]:
    """The colour that images are padded with: the one that becomes zero when normalised."""
    red, green, blue = (int(value * 255) for value in processor.image_mean)
    return red, green, blue


def resized(size: tuple[int, int], wanted: Mapping[str, int]) -> tuple[int, int]:
    """The (width, height) that an image of `size` is resized to."""
    if "shortest_edge" not in wanted:
        return wanted["width"], wanted["height"]
    short, long = min(size), max(size)
    long = int(wanted["shortest_edge"] * long / short)
    return (wanted["shortest_edge"], long) if size[0] <= size[1] else (long, wanted["shortest_edge"])


def _size_dict(value: object, *, exact: bool) -> dict[str, int]:
    """Read a size as files spell it: 336, [336, 336] (height first), or a dict."""
    if isinstance(value, Mapping):
        return {key: side for key, side in value.items() if side is not None}
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    if isinstance(value, int) and _are_sides([value]):
        return {"height": value, "width": value} if exact else {"shortest_edge": value}
    raise InputError(f"size {value!r} of an image processor is not a number, a pair or a dict.")


def _are_sides(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 < value <= MAX_SIDE for value in values)


def _convnext_sizes(size: object, crop_pct: float) -> dict[str, Any]:
    """ConvNeXt's rule: below 384 pixels a larger image is cropped, from there on it is resized to a square."""
    side = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
    if not isinstance(side, int) or not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
        raise InputError(f"size {size!r} with crop_pct {crop_pct!r} of an image processor is not a size to crop from.")
    square = {"height": side, "width": side}
    if side >= 384:
        return {"size": square, "crop_size": square, "do_center_crop": False}
    return {"size": {"shortest_edge": int(side / crop_pct)}, "crop_size": square, "do_center_crop": True}


def _known_class(name: str | None) -> str:
    """The class of processor, without the backend or version in its name."""
    if name is None:
        return "CLIPImageProcessor"
    if not isinstance(name, str):
        raise InputError(f"the image processor's type {name!r} is not a name; known: {', '.join(DEFAULTS)}.")
    plain = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain not in DEFAULTS:
        raise InputError(f"the image processor {name!r} is not known; known: {', '.join(DEFAULTS)}.")
    return plain
