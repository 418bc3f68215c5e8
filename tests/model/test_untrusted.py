"""Untrusted checkpoints: whatever their files say, one sentence comes before memory is taken or code is run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_kit import run_python
from family import theirs
from safetensors.torch import load_file
from tiny import ANYRES, build, save_tower
from transformers_kit import small_llava_next

from llava.convert.convert import convert
from llava.convert.describe import describe_checkpoint
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.files import read_json
from llava.model.builder import load, load_tokenizer
from llava.model.checkpoints.weight_files import load_pickled_tensors, read_headers

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("untrusted")
    return {"original": build(place / "o", **ANYRES), "transformers": theirs(small_llava_next)(place / "t")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "model")


def change(folder: Path, *path: str, value: object, file: str = "config.json") -> str:
    """Set a value at a path of keys in a JSON file; returns what was in the file."""
    before = (folder / file).read_text()
    content = json.loads(before)
    part = content
    for key in path[:-1]:
        part = part.setdefault(key, {})
    part[path[-1]] = value
    (folder / file).write_text(json.dumps(content))
    return before


def key_paths(values: dict[str, object], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict) and not before:
            yield from key_paths(value, (key,))


# --- sizes ------------------------------------------------------------------------------------------------------------

SIZES = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 99), ("hidden_size", 2**20), ("hidden_size", 10**30),
    ("intermediate_size", 2**20), ("vocab_size", 2**24), ("vocab_size", -5), ("num_attention_heads", 0),
    ("max_position_embeddings", 10**12), ("head_dim", 10**12), ("mm_hidden_size", 2**20),
    ("mm_projector_type", "mlp999999999x_gelu"), ("mm_projector_type", "mlp99x_gelu"), ("pad_token_id", 10**9),
    ("image_grid_pinpoints", [[28 * 10**6, 28 * 10**6]]), ("image_grid_pinpoints", "(1x1),...,(99999x99999)"),
]  # fmt: skip
TOWER_SIZES = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 99), ("hidden_size", 2**20), ("image_size", 10**9),
    ("image_size", 14 * 1000), ("intermediate_size", 2**20), ("num_attention_heads", 0), ("num_channels", 10**9),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SIZES)
def test_sizes_in_a_config_are_refused_before_memory_is_taken(
    folders: dict[str, Path], key: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_memory(monkeypatch)
    parts = {"original": (), "transformers": ("text_config",)}
    for layout, part in parts.items():
        if layout == "transformers" and ("mm_" in key or key == "image_grid_pinpoints"):
            continue
        before = change(folders[layout], *part, key, value=value)
        try:
            for use in (load_on_cpu, lambda place: convert(place, place.with_name("target"), to="original")):
                with pytest.raises(InputError) as error:
                    use(folders[layout])
                assert len(str(error.value)) < 600
        finally:
            (folders[layout] / "config.json").write_text(before)


@pytest.mark.parametrize("own_weights", [True, False])
@pytest.mark.parametrize(("key", "value"), TOWER_SIZES)
def test_sizes_in_a_tower_s_config(
    folder: Path, key: str, value: object, own_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_weights:
        save_tower(folder / "tower")
        change(folder, "unfreeze_mm_vision_tower", value=False)
    change(folder, key, value=value, file="tower/config.json")
    refuse_memory(monkeypatch)
    with pytest.raises(InputError):
        load_on_cpu(folder)


def refuse_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a parameter of more than a million numbers in real memory fail the test."""
    empty = torch.empty

    def bounded(*size: object, **options: object) -> torch.Tensor:
        result = empty(*size, **options, **({} if "device" in options else {"device": torch.get_default_device()}))
        assert result.is_meta or result.numel() < 10**6, "memory was taken"
        return result

    monkeypatch.setattr(torch, "empty", bounded)


def load_on_cpu(folder: Path) -> None:
    load(folder, device="cpu")


def refusal(use: Callable[[Path], object], folder: Path) -> str:
    """The sentence by which a folder is refused; empty where it is not."""
    try:
        use(folder)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [10**18, [1, "a"], "x"], ids=str)
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_any_value_of_any_key_gives_a_model_or_a_sentence(folders: dict[str, Path], layout: str, value: object) -> None:
    folder = folders[layout]
    for path in key_paths(read_json(folder / "config.json")):
        before = change(folder, *path, value=value)
        said = [refusal(use, folder) for use in (describe_checkpoint, load_on_cpu)]
        (folder / "config.json").write_text(before)
        assert not any("\n" in sentence or len(sentence) > 1000 for sentence in said), path


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tower/config.json",
        "tower/preprocessor_config.json", "model.safetensors.index.json", "adapter_config.json", "quant_config.json",
        "chat_template.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 200_000 + "1" + "}" * 200_000], ids=["list", "object"])
def test_json_that_is_nested_deep(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    said = refusal(load_on_cpu, folder)
    assert 0 < len(said) < 600
    assert refusal(describe_checkpoint, folder) in ("", said)  # it reads fewer files
    assert examine_checkpoint(folder, quick=True).findings


def test_a_weight_file_whose_header_is_nested_deep(folder: Path) -> None:
    header = ('{"a":' + DEEP + "}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="damaged header"):
        load_on_cpu(folder)


def test_a_json_file_without_end(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**34)  # takes no room on the disk
    with pytest.raises(InputError, match="more than"):
        read_json(file)


# --- pickles ----------------------------------------------------------------------------------------------------------

MEMO_BOMB = b"\x80\x02}r\xff\xff\xff\x7f."  # numbers an object 2^31 - 1: a table of 34 GB
CALL_BOMB = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."
LENGTH_BOMB = b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."


def zipped(data: bytes, *, compression: int = zipfile.ZIP_STORED, extra: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", extra)
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    """As torch wrote before 1.6: a magic number, a version, the machine, and then the table."""
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*parts, data, pickle.dumps([], 2)])


@pytest.mark.parametrize("bomb", [MEMO_BOMB, CALL_BOMB, LENGTH_BOMB], ids=["memo", "call", "length"])
@pytest.mark.parametrize("form", [zipped, legacy, bytes], ids=["zip", "legacy", "bare"])
def test_small_pickles_that_expand(tmp_path: Path, bomb: bytes, form: object) -> None:
    """In a process with little memory, which each of them would exceed."""
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(form(bomb))
    assert len(file.read_bytes()) < 700
    for read in (read_headers, load_pickled_tensors):
        with pytest.raises(InputError, match="cannot be read as a table of tensors"):
            read(file)


def test_archives_that_expand(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as archive:
        table = archive.read("pytorch_model/data.pkl")
    file.write_bytes(zipped(table, compression=zipfile.ZIP_DEFLATED, extra=bytes(10**6)))
    with pytest.raises(InputError, match="compressed"):
        read_headers(file)
    # A tensor of many numbers, all of them the same one.
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, file)
    with pytest.raises(InputError, match="announces 4000000000000 bytes"):
        read_headers(file)


def test_what_torch_writes_is_read(folder: Path) -> None:
    """Both of its forms, parameters too."""
    state = load_file(folder / "model.safetensors")
    table = {name: torch.nn.Parameter(tensor) if "norm" in name else tensor for name, tensor in state.items()}
    for is_zip in (True, False):
        torch.save(table, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        read = load_pickled_tensors(folder / "pytorch_model.bin")
        assert read.keys() == read_headers(folder / "pytorch_model.bin").keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)


# --- code -------------------------------------------------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path({!r}).touch()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None],
            "AutoModel": "evil.Model", "AutoProcessor": "evil.Model", "AutoImageProcessor": "evil.Model"}  # fmt: skip


@pytest.mark.parametrize("kind", ["llava", "llama", "t5", "clip", "never_heard"])
def test_code_that_a_checkpoint_names_is_neither_run_nor_offered(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the user would say yes."""
    marker = tmp_path / "it-ran"
    (folder / "evil.py").write_text(CODE.format(str(marker)))
    config = json.loads((folder / "config.json").read_text())
    if kind != "llava":
        config = {key: value for key, value in config.items() if "mm_" not in key} | {
            "model_type": kind,
            "architectures": ["X"],
        }
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    for name in ("tokenizer_config.json", "tower/config.json", "tower/preprocessor_config.json"):
        change(folder, "auto_map", value=AUTO_MAP, file=name)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    said = [
        refusal(use, folder) for use in (load_on_cpu, load_tokenizer, lambda path: examine_checkpoint(path, quick=True))
    ]
    assert (said[0] == "") == (kind == "llava")
    assert not marker.exists()
    assert asked == []


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config"]
)
@pytest.mark.parametrize("place", ["config", "text_config", "vision_config", "tower"])
def test_kernels_of_the_hub_are_never_loaded(
    folders: dict[str, Path], folder: Path, key: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folders["transformers"] if place.endswith("_config") else folder
    path = (place, key) if place.endswith("_config") else (key,)
    file = "tower/config.json" if place == "tower" else "config.json"
    before = change(model, *path, value="evil/kernel", file=file)
    try:
        with pytest.raises(InputError, match=rf"{key} 'evil/kernel', which is code of the hub"):
            load_on_cpu(model)
    finally:
        (model / file).write_text(before)


def test_an_implementation_in_a_config_is_left_to_the_machine(folder: Path) -> None:
    """FlashAttention that is not installed would be fetched from the hub."""
    for file in ("config.json", "tower/config.json"):
        change(folder, "attn_implementation", value="flash_attention_2", file=file)
    model = load(folder, device="cpu").model
    assert model.config._attn_implementation == "sdpa"
    assert model.get_vision_tower().config._attn_implementation == "sdpa"


def test_memory_stays_small(tmp_path: Path) -> None:
    """In a process whose memory is limited, since a test cannot see what was taken and given back."""
    for form in (zipped, legacy, bytes):
        for number, bomb in enumerate((MEMO_BOMB, CALL_BOMB, LENGTH_BOMB)):
            (tmp_path / f"{form.__name__}{number}.bin").write_bytes(form(bomb))
    code = f"""if True:
        import pathlib, resource
        from llava.model.checkpoints.weight_files import InputError, read_headers
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
        for file in pathlib.Path({str(tmp_path)!r}).iterdir():
            try:
                read_headers(file)
            except InputError as error:
                assert "MemoryError" not in str(error), (file.name, str(error))
        status = pathlib.Path("/proc/self/status").read_text()  # a maximum of getrusage counts the process before exec
        print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    """
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 500_000
