"""The causes that `llava doctor` can find, and the types of its results.

In: nothing. Out: `CAUSES`, every cause by its code; `DoctorFinding`, a cause found in one input, with evidence and a remedy;
`DoctorReport`, all findings of one input and the checks that were skipped; `run_checks`. The checks are in checkpoint_*.py,
dataset.py, training_config.py and server.py; diagnose/doctor.py prints. Importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import InputError


@dataclass(frozen=True)
class Cause:
    """`meaning`: what is wrong and what it looks like. `where`: the functions (file:name) in which it shows."""

    meaning: str
    where: tuple[str, ...]


_LOADING = ("llava/model/checkpoints/loading.py:match_names",)
_SPLICE = "llava/model/llava_arch.py:prepare_inputs_labels_for_multimodal"
_VOCABULARY = ("llava/model/tokenizer_setup.py:read_tokenizer", "llava/model/tokenizer_setup.py:fit_vocabulary")
_TEMPLATE = ("llava/model/tokenizer_setup.py:conv_mode", "llava/conversation.py:answer_end")
_PROJECTOR = ("llava/model/multimodal_projector/builder.py:build_vision_projector",)
_SAMPLES = ("llava/data/validate.py:SampleChecker", "llava/train/data.py:LazySupervisedDataset")

CAUSES: dict[str, Cause] = {
    # Files of a checkpoint
    "config-unreadable": Cause(
        "config.json is missing or damaged", ("llava/model/checkpoints/inspect.py:read_config",)
    ),
    "config-value": Cause(
        "a setting in config.json has an invalid value", ("llava/model/config.py:LlavaSettings.from_hf",)
    ),
    "model-type": Cause(
        "the folder holds a model that is not read here", ("llava/model/checkpoints/foreign.py:foreign_model",)
    ),
    "weights-missing": Cause("the folder holds no weights", ("llava/model/checkpoints/inspect.py:inspect",)),
    "shard-missing": Cause(
        "a weight file that other files refer to is missing", ("llava/model/checkpoints/inspect.py:stored_tensors",)
    ),
    "shard-corrupt": Cause(
        "a weight file is truncated or damaged", ("llava/model/checkpoints/weight_files.py:read_headers",)
    ),
    "shard-index": Cause(
        "the index of shards is damaged, or names the wrong file for a tensor",
        ("llava/model/checkpoints/inspect.py:stored_tensors",),
    ),
    "weights-empty": Cause("tensors were saved empty (ZeRO-3 shards that were not gathered)", _LOADING),
    "weights-config": Cause("names or shapes of the weights do not match config.json", _LOADING),
    "weights-damaged": Cause(
        "weights contain NaN, infinity or impossible values: answers are empty or noise",
        ("llava/model/checkpoints/loading.py:load_weights",),
    ),
    "load-fails": Cause("loading ends with an error", ("llava/model/builder.py:load",)),
    # Tower, images
    "tower-missing": Cause(
        "the vision tower is not where its name says", ("llava/model/checkpoints/hub.py:resolve_vision_tower",)
    ),
    "tower-type": Cause(
        "the vision tower's type is unknown", ("llava/model/multimodal_encoder/builder.py:TOWER_CLASSES",)
    ),
    "tower-weights": Cause(
        "the tower's weights are neither in the checkpoint nor in its folder",
        ("llava/model/checkpoints/loading.py:load_tower_weights",),
    ),
    "tower-unused": Cause(
        "the stored vision tower is not used, and differs from the one that is",
        ("llava/model/checkpoints/loading.py:differing_tower_tensors",),
    ),
    "select-layer": Cause(
        "mm_vision_select_layer is a layer that the tower does not have",
        ("llava/model/multimodal_encoder/clip_encoder.py:feature_select",),
    ),
    "preprocessor": Cause(
        "the pixels' size or range differs from the tower's training",
        ("llava/images/image_processor.py:ClipImageProcessor", "llava/mm_utils.py:process_images"),
    ),
    "image-mode": Cause(
        "image_aspect_ratio (or mm_patch_merge_type) differs from the training of the weights",
        ("llava/mm_utils.py:process_images", "llava/model/llava_arch.py:image_policy"),
    ),
    "newline-missing": Cause(
        "spatial_unpad needs image_newline, which is not stored", ("llava/model/merge.py:merge_tiles",)
    ),
    "pinpoints": Cause(
        "image_grid_pinpoints are missing, unreadable or not multiples of the tower's image size",
        ("llava/images/layout.py:ImagePolicy", "llava/images/layout.py:read_pinpoints"),
    ),
    "context-short": Cause(
        "images and prompt take all or nearly all of the context",
        ("llava/engine/request.py:PromptSize.room", "llava/model/tokenizer_setup.py:context_len"),
    ),
    "context-positions": Cause(
        "the length limit exceeds the language model's number of positions",
        ("llava/model/tokenizer_setup.py:context_len",),
    ),
    # Projector
    "projector-missing": Cause(
        "there is no projector", ("llava/model/multimodal_projector/pretrained.py:load_projector", *_LOADING)
    ),
    "projector-empty": Cause(
        "the projector was saved empty (ZeRO-3 shards that were not gathered)",
        (
            "llava/train/run_folder/save.py:maybe_zero_3",
            "llava/model/multimodal_projector/pretrained.py:load_projector",
        ),
    ),
    "projector-type": Cause("the projector's layers do not match mm_projector_type", _PROJECTOR),
    "projector-width": Cause("the projector's input width is not the tower's: it belongs to another tower", _PROJECTOR),
    "config-width": Cause("mm_hidden_size is neither the tower's nor the projector's width", _PROJECTOR),
    "projector-other-model": Cause(
        "the projector's output width is not the language model's: it belongs to another model", _PROJECTOR
    ),
    "projector-dead": Cause(
        "the projector's weights are all zero: images have no effect", ("llava/model/llava_arch.py:encode_images",)
    ),
    "image-ignored": Cause(
        "the image does not change the model's output", ("llava/model/llava_arch.py:encode_images", _SPLICE)
    ),
    # Tokenizer, vocabulary, template
    "tokenizer-missing": Cause("the folder holds no tokenizer", ("llava/text/tokenization.py:load_tokenizer",)),
    "tokenizer-unreadable": Cause("the tokenizer's files are damaged", ("llava/text/tokenization.py:load_tokenizer",)),
    "tokenizer-roundtrip": Cause(
        "encoding and decoding changes a text: answers are noise", ("llava/text/tokenization.py:load_tokenizer",)
    ),
    "vocabulary-small": Cause(
        "the tokenizer has tokens without an embedding row: the embeddings were not resized", _VOCABULARY
    ),
    "marker-rows": Cause("image tokens that config.json asks for have no trained embedding rows", _VOCABULARY),
    "vocabulary-config": Cause("vocab_size is not the number of stored embedding rows", _LOADING),
    "vocabulary-head": Cause("the output layer and the embedding table differ in their number of rows", _LOADING),
    "vocabulary-other": Cause("the tokenizer belongs to another model: most embedding rows have no token", _VOCABULARY),
    "begin-token": Cause(
        "prompts lack the begin token that this model was trained with",
        ("llava/text/tokenization.py:tokenizer_image_token",),
    ),
    "end-token": Cause(
        "generation does not stop at the token that ends an answer",
        ("llava/model/tokenizer_setup.py:read_generation_config", "llava/text/detokenizer.py:IncrementalDetokenizer"),
    ),
    "pad-token": Cause(
        "the padding token is an ordinary token: the attention mask hides text",
        ("llava/train/data.py:DataCollatorForSupervisedDataset", "llava/model/llava_arch.py:_padding_mask"),
    ),
    "special-token": Cause(
        "an end token or image token is not marked special: it stays in the output",
        ("llava/text/detokenizer.py:stream_decoder", "llava/text/detokenizer.py:IncrementalDetokenizer"),
    ),
    "template-unreadable": Cause(
        "the folder's chat template is damaged, or cannot render a question",
        ("llava/chat_template.py:read_chat_template", "llava/chat_template.py:ChatTemplate.render"),
    ),
    "template-unknown": Cause("conv_mode names a template that does not exist", _TEMPLATE),
    "template-mismatch": Cause("the template does not fit the model: its end string is not a token here", _TEMPLATE),
    "chat-template": Cause(
        "the tokenizer's chat template formats turns differently from the training template",
        ("llava/model/tokenizer_setup.py:conv_mode", "llava/conversation.py:Conversation.get_prompt"),
    ),
    "generation-config": Cause(
        "generation_config.json is damaged", ("llava/model/tokenizer_setup.py:read_generation_config",)
    ),
    # Adapters
    "base-missing": Cause(
        "the base model is not where the folder says", ("llava/model/checkpoints/base_model.py:find_base",)
    ),
    "lora-base": Cause(
        "the adapter changes tensors that the base does not have, or that have another shape there", _LOADING
    ),
    "lora-empty": Cause("the adapter was saved empty", ("llava/train/run_folder/save.py:get_peft_state_maybe_zero_3",)),
    "lora-rank": Cause(
        "the rank in adapter_config.json is not that of the tensors", ("llava/model/checkpoints/lora.py:LoraMerge",)
    ),
    "lora-untrained": Cause(
        "the adapter changes nothing: its B matrices are all zero", ("llava/model/checkpoints/lora.py:LoraMerge",)
    ),
    # Running
    "padding-side": Cause("tokenizer_padding_side is neither left nor right", ("llava/model/splice.py:pad",)),
    "padding": Cause(
        "an answer depends on the padding in its batch: positions or mask are wrong",
        ("llava/model/splice.py:pad", _SPLICE),
    ),
    "overflow": Cause(
        "activations exceed the range of the stored dtype: NaN in half precision", ("llava/model/device.py:pick_dtype",)
    ),
    # Training data
    "data-unreadable": Cause("the data file cannot be read", ("llava/data/samples.py:open_samples",)),
    "data-malformed": Cause("records that are not samples", _SAMPLES),
    "data-missing-image": Cause("images that do not exist", ("llava/data/media_files.py:locate_image",)),
    "data-broken-image": Cause("images that cannot be decoded", ("llava/images/io.py:load_image",)),
    "data-placeholders": Cause(
        "the number of <image> placeholders is not the number of images",
        ("llava/text/labels.py:preprocess_multimodal", _SPLICE),
    ),
    "data-turn-order": Cause("questions and answers do not alternate", ("llava/text/labels.py:dialogue_spans",)),
    "data-empty-answer": Cause("answers without text", _SAMPLES),
    "data-nothing-to-train": Cause(
        "labels are all -100: nothing is learned, and the loss is NaN or constant",
        ("llava/text/labels.py:encode_spans",),
    ),
    "data-too-long": Cause("samples longer than the limit are truncated", ("llava/data/truncation.py:fit",)),
    "data-unread-key": Cause(
        "keys that say something else than what is trained", ("llava/data/formats.py:read_record",)
    ),
    "data-duplicate-id": Cause("ids that occur more than once", ("llava/data/check.py:collect",)),
    # Training runs
    "run-arguments": Cause(
        "the run's arguments are invalid or contradict each other", ("llava/train/arguments.py:parse_train_args",)
    ),
    "run-base": Cause("the base model cannot be used", ("llava/train/model_setup.py:load_base_model",)),
    "run-adapter": Cause(
        "pretrain_mm_mlp_adapter is not a projector file",
        ("llava/model/multimodal_projector/pretrained.py:read_projector_weights",),
    ),
    "run-adapter-settings": Cause(
        "the run's vision settings differ from those that its projector was pretrained with",
        ("llava/model/llava_arch.py:initialize_vision_modules",),
    ),
    "run-frozen": Cause(
        "everything is frozen, or the learning rate is 0: the loss stays constant",
        ("llava/train/model_setup.py:count_trained", "llava/train/model_setup.py:add_vision"),
    ),
    "run-projector-frozen": Cause(
        "a new projector is frozen: image features stay random", ("llava/train/model_setup.py:add_vision",)
    ),
    "run-template": Cause(
        "--version is not the template that the model was trained with",
        ("llava/train/model_setup.py:name_template",),
    ),
    "run-precision": Cause(
        "float16 training of weights that were trained in bfloat16: overflow, NaN losses",
        ("llava/train/llava_trainer.py:LLaVATrainer",),
    ),
    # Servers
    "server-unreachable": Cause("nothing answers at the address", ("llava/diagnose/checks/server.py:examine_server",)),
    "server-unhealthy": Cause(
        "the server reports that it is not ready", ("llava/diagnose/checks/server.py:examine_server",)
    ),
    "server-no-model": Cause("the server offers no model", ("llava/diagnose/checks/server.py:examine_server",)),
    "server-fails": Cause("a question is answered with an error", ("llava/diagnose/checks/server.py:examine_server",)),
    "server-empty": Cause("answers are empty", (_SPLICE, "llava/diagnose/checks/server.py:examine_server")),
    "server-image-ignored": Cause(
        "an image adds no tokens to the prompt: it does not reach the model", (_SPLICE, "llava/processor.py:Processor")
    ),
    "server-special-token": Cause(
        "special tokens remain in the answers", ("llava/text/detokenizer.py:IncrementalDetokenizer",)
    ),
    "server-stream": Cause("streamed answers differ from complete ones", ("llava/text/detokenizer.py:stream_decoder",)),
}


# Repairs a copy of an input and returns what it changed.
Fix = Callable[[Path], str]


@dataclass(frozen=True)
class DoctorFinding:
    """A cause found in one input. `fix` repairs a copy of that input (a folder or a file) and returns what it changed."""

    code: str
    what: str  # one sentence
    evidence: Mapping[str, object]
    remedy: str
    fix: Fix | None = field(default=None, repr=False, compare=False)

    @property
    def where(self) -> tuple[str, ...]:
        return CAUSES[self.code].where

    def as_json(self) -> dict[str, object]:
        return {
            "code": self.code,
            "what": self.what,
            "evidence": dict(self.evidence),
            "where": list(self.where),
            "remedy": self.remedy,
            "fixable": self.fix is not None,
        }


@dataclass
class DoctorReport:
    """The result for one input. `checked`: names of the checks that ran; `skipped`: (check, reason)."""

    subject: str
    kind: str
    findings: list[DoctorFinding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def codes(self) -> list[str]:
        return [finding.code for finding in self.findings]

    def as_json(self) -> dict[str, object]:
        return {
            "subject": self.subject,
            "kind": self.kind,
            "facts": self.facts,
            "findings": [finding.as_json() for finding in self.findings],
            "looked_at": self.checked,
            "not_looked_at": [{"check": check, "because": why} for check, why in self.skipped],
        }


@dataclass(frozen=True)
class DoctorCheck:
    """A check, skipped if one that it `needs`, or with `last` any before it, was skipped or found something."""

    name: str
    run: Callable[[Any], Iterator[DoctorFinding] | None]
    needs: tuple[str, ...] = ()
    last: bool = False


class CheckSkipped(Exception):
    """Raised by a check that cannot run here; the message is the reason."""


class CheckEnded(Exception):
    """Raised by a check that cannot go on after a finding."""

    def __init__(self, finding: DoctorFinding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def found(code: str, what: str, remedy: str, *, fix: Fix | None = None, **evidence: object) -> DoctorFinding:
    """Make a finding; its code is a key of `CAUSES`."""
    assert code in CAUSES, code
    return DoctorFinding(code, what, evidence, remedy, fix)


@contextmanager
def reported(code: str, remedy: str, *, fix: Fix | None = None, **evidence: object) -> Iterator[None]:
    """End the check with a finding that says what an `InputError` in the block says."""
    try:
        yield
    except InputError as error:
        raise CheckEnded(found(code, str(error), remedy, fix=fix, **evidence)) from error


def run_checks(subject: object, checks: tuple[DoctorCheck, ...], report: DoctorReport) -> DoctorReport:
    """Run the checks in order and add to the report what they find, and which of them are skipped."""
    stopped: dict[str, str] = {}
    for check in checks:
        reason = next((stopped[name] for name in check.needs if name in stopped), None)
        if check.last and report.findings:
            reason = f"{report.findings[0].code} was found"
        findings: list[DoctorFinding] = []
        if reason is None:
            try:
                for finding in check.run(subject) or ():
                    findings.append(finding)
            except CheckEnded as end:
                findings.append(end.finding)
            except CheckSkipped as skipped:
                reason = str(skipped)
        if reason is not None:
            stopped[check.name] = reason
            report.skipped.append((check.name, reason))
            continue
        report.checked.append(check.name)
        report.findings += findings
        if findings:
            stopped[check.name] = f"{findings[0].code} was found"
    return report
