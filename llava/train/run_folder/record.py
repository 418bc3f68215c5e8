"""The record of a run, by which its folder is resumed by the same run only.

In: the arguments of a run. Out: `run.json` in its output folder, with the settings that make it this run, those that may
change when it is resumed, and whether it is finished; the checkpoint to resume from; a lock against a second run.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.data.samples import data_files
from llava.errors import InputError
from llava.files import read_json, write_whole
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.run_folder.checkpoints import (
    checkpoint_fault,
    latest_checkpoint,
    list_checkpoints,
    remove_unfinished_checkpoints,
)

logger = logging.getLogger(__name__)

RECORD_FILE = "run.json"
LOCK_FILE = ".lock"

# Settings of model and data that may change when a run is resumed.
_MAY_CHANGE = (
    "attn_implementation",
    "lazy_preprocess",
    "is_multimodal",
    "on_bad_sample",
    "image_folder",
    "eval_data_path",
    "eval_image_folder",
)
# Of transformers' settings and our own, those that decide which weights are trained, and on which batches.
_TRAINING = (
    "freeze_mm_mlp_adapter",
    "model_max_length",
    "double_quant",
    "quant_type",
    "bits",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",
    "lora_target_modules",
    "lora_use_dora",
    "lora_use_rslora",
    "group_by_modality_length",
    "packing",
    "pack_length",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "optim",
    "loss_average",
    "average_tokens_across_devices",
    "label_smoothing_factor",
)
_ADJUSTABLE = (
    "learning_rate",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "bf16",
    "fp16",
)
_PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path")
_SCHEDULE = ("num_train_epochs", "max_steps")
_RESULTS = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json", "trainer_state.json", RECORD_FILE)
_BLOCK, _NUM_BLOCKS = 1 << 20, 256  # of a file over 256 MiB not all is read


@dataclass
class RunRecord:
    """What `run.json` holds.

    Attributes:
        settings: What makes the run this run; a folder is resumed only where all of it is equal.
        adjustable: What may change when it is resumed.
        digests: Contents of the files that settings name, so that a moved file is the same and a changed one is not.
        finished: Whether the result was written.
    """

    settings: dict[str, object]
    adjustable: dict[str, object]
    digests: dict[str, str]
    finished: bool = False

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD_FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def differences(self, earlier: RunRecord) -> list[str]:
        """Name each setting that the earlier run had another value of, and each file whose content changed."""
        found = []
        for name in sorted({*self.settings, *earlier.settings}):
            mine, theirs = self.settings.get(name), earlier.settings.get(name)
            digests = self.digests.get(name), earlier.digests.get(name)
            if all(digests):
                if digests[0] != digests[1]:
                    same = f"{theirs!r} with another content" if mine == theirs else repr(theirs)
                    found.append(f"{name} {mine!r} (before: {same})")
            elif mine != theirs:
                found.append(f"{name} {mine!r} (before: {theirs!r})")
        return found

    def adjusted(self, earlier: RunRecord) -> list[str]:
        """Name each setting that changes while the run goes on."""
        return [
            f"{name} {value!r} (before: {earlier.adjustable.get(name)!r})"
            for name, value in self.adjustable.items()
            if name in earlier.adjustable and earlier.adjustable[name] != value
        ]


def describe_run(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> RunRecord:
    """Record the settings of a run as they were given, before a checkpoint's settings complete them."""
    settings = {
        **{
            entry.name: getattr(model, entry.name)
            for entry in dataclasses.fields(model)
            if entry.name not in _MAY_CHANGE
        },
        **{
            entry.name: getattr(data, entry.name)
            for entry in dataclasses.fields(data)
            if entry.init and entry.name not in _MAY_CHANGE
        },
        **{name: getattr(training, name) for name in _TRAINING},
        "samples_per_step": (
            training.per_device_train_batch_size
            * training.gradient_accumulation_steps
            * training.world_size
            * max(1, training.n_gpu)
        ),
    }
    adjustable = {name: getattr(training, name) for name in _ADJUSTABLE}
    digests = {name: digest for name in _PATHS if (digest := _digest(settings.get(name), is_data=name == "data_path"))}
    return RunRecord(_plain(settings), _plain(adjustable), digests)


def _plain(settings: dict[str, object]) -> dict[str, object]:
    """Settings as JSON gives them back, so that those of two runs compare."""
    plain: dict[str, object] = json.loads(json.dumps(settings, default=str))
    return plain


def _digest(named: object, *, is_data: bool) -> str | None:
    """Digest the content of a file or folder; None for the name of a hub repository."""
    if not isinstance(named, str) or not named:
        return None
    if is_data:
        files = data_files(named)
    else:
        path = Path(named)
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if not file.is_file():
            return None
        digest.update(file.name.encode() if not is_data else b"")
        _update(digest, file)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, file: Path) -> None:
    """Add a file: its size and its content; of one that is large, blocks that are spread over it."""
    size = file.stat().st_size
    digest.update(f"{size}\n".encode())
    starts: Iterable[int] = range(0, size, _BLOCK)
    if size > _NUM_BLOCKS * _BLOCK:
        starts = ((size - _BLOCK) * number // (_NUM_BLOCKS - 1) for number in range(_NUM_BLOCKS))
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(_BLOCK))


def read_record(folder: Path) -> RunRecord | None:
    """Read the record of a folder; None if it has none.

    Raises:
        InputError: The file is not such a record.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    try:
        return RunRecord(**{entry.name: values[entry.name] for entry in dataclasses.fields(RunRecord)})
    except KeyError as error:
        raise InputError(f"{str(file)!r} is no record of a training run: it has no {error.args[0]!r}") from error


@contextmanager
def open_run_folder(
    model: ModelArguments, data: DataArguments, training: TrainingArguments
) -> Iterator[tuple[RunRecord, str | None]]:
    """Lock the output folder, check that this run may write there, and find the checkpoint to resume from.

    Yields:
        The record of this run, and the checkpoint's folder or None.

    Raises:
        InputError: Another run writes there; the folder holds the result of another run, or a finished one; ranks on
            other machines see other checkpoints; the checkpoint that `--resume_from_checkpoint` names is none.
    """
    folder, record, fault = Path(training.output_dir), describe_run(model, data, training), None
    with ExitStack() as opened:
        if training.should_save:
            try:
                opened.enter_context(_locked(folder))
                remove_unfinished_checkpoints(folder)
                _check_folder(folder, record, training)
            except (InputError, OSError) as error:
                fault = error
        raise_on_all_ranks(fault, training)
        resumed = _agreed_checkpoint(training)
        if training.should_save:
            record.write(folder)
        yield record, resumed


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock during the block; its file is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink == 0:  # that run ended between the two calls
                raise BlockingIOError
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {str(folder)!r}; wait for it, or give another --output_dir"
            ) from None
        except OSError as error:  # a disk without locks
            logger.warning("%s cannot be locked (%s): no second run may write there", folder, error)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def raise_on_all_ranks(fault: Exception | None, training: TrainingArguments) -> None:
    """Raise on every rank what any of them found; a rank that went on alone would wait for the others without end."""
    if training.world_size > 1:
        faults: list[Exception | None] = [fault] * training.world_size
        torch.distributed.all_gather_object(faults, fault)
        fault = next((each for each in faults if each is not None), None)
    if fault is not None:
        raise fault


def _check_folder(folder: Path, record: RunRecord, training: TrainingArguments) -> None:
    earlier, insists = read_record(folder), _names_checkpoint(training)
    if earlier is not None and not earlier.finished and not list_checkpoints(folder):
        return  # it left nothing
    remedy = "give another --output_dir, or remove that folder first"
    if earlier is None:
        if list_checkpoints(folder):
            logger.warning(
                "%s has checkpoints but no %s: whether they are of this run cannot be checked", folder, RECORD_FILE
            )
        elif found := next((file.name for pattern in _RESULTS for file in sorted(folder.glob(pattern))), None):
            raise InputError(f"{str(folder)!r} holds another result already ({found}); {remedy}")
        return
    different = record.differences(earlier)
    if different and insists:
        logger.warning("the checkpoint is of a run with other settings: %s", "; ".join(different))
    elif different:
        raise InputError(
            f"{str(folder)!r} holds another run: this one has {'; '.join(different)}; {remedy} "
            "(--resume_from_checkpoint FOLDER goes on from a checkpoint all the same)"
        )
    adjusted = record.adjusted(earlier)
    if adjusted and list_checkpoints(folder):
        whose = "; under DeepSpeed, the optimizer keeps the values in the checkpoint" if training.deepspeed else ""
        logger.warning("the run goes on with %s%s", ", ".join(adjusted), whose)
    if earlier.finished and not insists and all(record.adjustable[n] == earlier.adjustable.get(n) for n in _SCHEDULE):
        raise InputError(
            f"the run in {str(folder)!r} is finished, and its result is there; raise --num_train_epochs or --max_steps to "
            f"go on, or {remedy}"
        )
    if earlier.finished and not list_checkpoints(folder):
        raise InputError(f"the run in {str(folder)!r} is finished and left no checkpoint to go on from; {remedy}")


def _names_checkpoint(training: TrainingArguments) -> bool:
    return training.resume_from_checkpoint not in ("True", "true", True, None, "False", "false", False)


def _agreed_checkpoint(training: TrainingArguments) -> str | None:
    """Find the checkpoint to resume from; with several processes, all must have found the same."""
    found, fault = None, None
    try:
        found = _checkpoint_to_resume(training)
    except InputError as error:
        fault = error
    raise_on_all_ranks(fault, training)
    if training.world_size == 1:
        return found
    mine = (socket.gethostname(), None if found is None else Path(found).name)
    everyone = [mine] * training.world_size
    torch.distributed.all_gather_object(everyone, mine)
    if len({name for _, name in everyone}) > 1:
        seen = ", ".join(f"{host}: {name or 'none'}" for host, name in dict.fromkeys(everyone))
        raise InputError(
            f"the machines see different checkpoints in {training.output_dir!r} ({seen}); put --output_dir on a disk that "
            "all of them share, or copy the newest checkpoint to each"
        )
    return found


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names; without it, the newest complete one in the output folder."""
    named, folder = training.resume_from_checkpoint, Path(training.output_dir)
    if named in ("False", "false", False):
        return None
    if not _names_checkpoint(training):
        latest = latest_checkpoint(folder)
        if latest is None and named is not None:
            raise InputError(f"--resume_from_checkpoint True, but {str(folder)!r} holds no complete checkpoint-*")
        if latest is not None:
            _check_partitions(latest, training)
        return None if latest is None else str(latest)
    if fault := checkpoint_fault(Path(str(named))):
        raise InputError(f"--resume_from_checkpoint {named!r} is not a checkpoint folder to resume from: {fault}")
    _check_partitions(Path(str(named)), training)
    return str(named)


def _check_partitions(checkpoint: Path, training: TrainingArguments) -> None:
    """Refuse a checkpoint of DeepSpeed's for another number of processes, whose optimizer states it cannot divide anew."""
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if training.deepspeed and parts not in (0, training.world_size):
        raise InputError(
            f"{str(checkpoint)!r} was written by {parts} processes, and this run has {training.world_size}: DeepSpeed cannot "
            f"divide its optimizer states anew; go on with {parts} (runs without DeepSpeed, and with FSDP2, may change them)"
        )
