"""Read a pair of GGUF files as a model folder in the original layout.

In: the file of a language model and that of its tower and projector (`mmproj`), or a folder with one of each. Out: a folder
in the user's cache that holds the small files of a checkpoint (config, tokenizer, image processor) and an index that names
the two files; and the tensors of such a folder under published names. All else reads that folder like any other: weights
stay in the GGUF files, from which they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import InputError
from llava.files import cache_folder, read_json
from llava.model.checkpoints.gguf.config import TOWER_FOLDER, GgufKeys, read_gguf_config
from llava.model.checkpoints.gguf.file import WHOLE, GgufHeader, read_gguf_header
from llava.model.checkpoints.gguf.names import ROPE_FACTORS, SCALED_FEATURES, makes_features
from llava.model.checkpoints.gguf.tensors import gguf_header, is_mmproj, published_tensors, times
from llava.model.checkpoints.gguf.tokenizer import write_tokenizer
from llava.model.checkpoints.weight_files import TensorHeader

if TYPE_CHECKING:
    from hashlib import _Hash

logger = logging.getLogger(__name__)

INDEX = "gguf.json"
FORM = 1  # of the folder's content; another number makes all folders anew
END_BYTES = 2**20  # of each file, by which a folder is found again
MMPROJ = "mmproj"  # in the names of files with tower and projector


def is_gguf_folder(folder: Path) -> bool:
    """Whether a folder is one that `gguf_checkpoint` made."""
    return (folder / INDEX).is_file()


def holds_gguf_files(folder: Path) -> bool:
    """Whether a folder holds GGUF files, and neither a checkpoint nor an adapter beside them."""
    others = ("config.json", "adapter_config.json")
    return not any((folder / name).is_file() for name in others) and next(folder.glob("*.gguf"), None) is not None


def gguf_checkpoint(place: Path, mmproj: Path | None = None) -> Path:
    """Return the folder of small files for a pair of GGUF files, written if need be.

    Args:
        place: The language model's file, or a folder with the pair.
        mmproj: The file of tower and projector; None looks for it beside the other.

    Raises:
        InputError: The pair is not complete, damaged, or of a kind that is not read.
    """
    model, mmproj = find_pair(place, mmproj)
    digest = hashlib.sha256(f"{FORM}".encode())
    for file in (model, mmproj):
        _add_ends(digest, file)
    folder = cache_folder() / "gguf" / digest.hexdigest()[:16] / model.stem
    if not is_gguf_folder(folder):
        _write_folder(folder, model, mmproj, digest.hexdigest())
    return folder


def find_pair(place: Path, mmproj: Path | None = None) -> tuple[Path, Path]:
    """Find the language model's file and that of tower and projector, by what they hold."""
    if place.is_dir():
        files = sorted(place.glob("*.gguf"))
        texts = [file for file in files if not is_mmproj(file)]
        if len(texts) != 1:
            names = ", ".join(file.name for file in texts) or "none"
            raise InputError(
                f"the folder {place} holds {len(texts)} GGUF files of language models ({names}); give the one that is meant"
            )
        place, visions = texts[0], [file for file in files if file not in texts]
        mmproj = visions[0] if mmproj is None and len(visions) == 1 else mmproj
    elif is_mmproj(place):
        raise InputError(
            f"{place} holds a vision tower and a projector alone; give the language model's file, and this one with --mmproj"
        )
    if mmproj is None:
        beside = [file for file in sorted(place.absolute().parent.glob("*.gguf")) if MMPROJ in file.name.lower()]
        if len(beside) != 1:
            number = f"{len(beside)} files" if beside else "no file"
            raise InputError(
                f"{place} holds a language model alone, and {number} named {MMPROJ!r} beside it; give the file of tower and "
                "projector with --mmproj"
            )
        mmproj = beside[0]
        logger.info("tower and projector are read from %s", mmproj)
    elif not mmproj.is_file():
        raise InputError(f"there is no file {str(mmproj)!r}; give the file of tower and projector with --mmproj")
    elif not is_mmproj(mmproj):
        raise InputError(f"{mmproj} holds no vision tower; give the file of tower and projector with --mmproj")
    return place.absolute(), mmproj.absolute()


def gguf_pair_tensors(folder: Path) -> dict[str, TensorHeader]:
    """The tensors of a pair by published name, for a folder that `gguf_checkpoint` made."""
    index = read_json(folder / INDEX)
    found: dict[str, TensorHeader] = {}
    for part in ("model", "mmproj"):
        if not isinstance(index.get(part), str):
            raise InputError(
                f"{folder / INDEX} does not name the file {part!r}; remove that folder, and give the files again"
            )
        file = Path(index[part])
        found |= {
            name: TensorHeader(file, tensor.name, tensor.dtype, tensor.shape, tensor.start)
            for name, tensor in published_tensors(file).items()
        }
    return _with_features_scaled(found, Path(str(index["model"])), read_json(folder / "config.json"))


def _with_features_scaled(
    found: dict[str, TensorHeader], model: Path, config: Mapping[str, Any]
) -> dict[str, TensorHeader]:
    """The tensors with those that make image features as the language model of transformers takes them."""
    if gguf_header(model).architecture not in SCALED_FEATURES:
        return found
    factor, projector = float(config["hidden_size"]) ** 0.5, str(config["mm_projector_type"])
    scaled = {
        name: replace(header, name=times(header.name, factor), dtype="F32", start=None)
        for name, header in found.items()
        if makes_features(name, projector)
    }
    return found | scaled


def _add_ends(digest: _Hash, file: Path) -> None:
    """Take a file's name, size and ends, which hold its keys, into a digest."""
    state = file.stat()
    digest.update(f"\0{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(END_BYTES))
        stream.seek(max(0, state.st_size - END_BYTES))
        digest.update(stream.read())


def _write_folder(folder: Path, model: Path, mmproj: Path, digest: str) -> None:
    """Write the small files under another name, and give them theirs at once, since several processes may do so."""
    text, vision = read_gguf_header(model, longest=WHOLE), gguf_header(mmproj)
    config = read_gguf_config(text, vision, _rope_factors(text))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="incomplete-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}), and the config of {model.name} is kept "
            "there; set the variable XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        (staging / TOWER_FOLDER).mkdir()
        write_tokenizer(text, staging)
        ends = [int(GgufKeys(text).number(key)) for key in _END_KEYS if key in text.keys]
        if len(ends) > 1:
            _write_json(staging / "generation_config.json", {"eos_token_id": sorted(set(ends))})
        _write_json(staging / TOWER_FOLDER / "config.json", config.tower)
        _write_json(staging / TOWER_FOLDER / "preprocessor_config.json", config.image_processor)
        _write_json(staging / "config.json", config.values)
        _write_json(staging / INDEX, {"model": str(model), "mmproj": str(mmproj), "digest": digest})
        os.rename(staging, folder)
    except OSError:
        if not is_gguf_folder(folder):  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rope_factors(header: GgufHeader) -> tuple[float, ...] | None:
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.num_bytes is None:
        raise InputError(f"{header.file}: tensor {ROPE_FACTORS!r} is no row of numbers in single precision")
    with header.file.open("rb") as stream:
        stream.seek(tensor.start)
        return struct.unpack(f"<{tensor.shape[0]}f", stream.read(tensor.num_bytes))


# The tokens at which an answer ends: that of a text and that of a turn.
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
