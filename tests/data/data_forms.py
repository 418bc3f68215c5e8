"""Four samples written in every form of training data that is read; each writer returns what `--data_path` names.

The samples: one image and two rounds, two images, text alone, one image with a system text. A form that cannot hold all of
them says which it holds.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from golden_data import golden

NAMES = ("grad_64x48.png", "gray_50x50.png")
IMAGES = {name: golden(f"images/{name}").read_bytes() for name in NAMES}
ALL = (0, 1, 2, 3)


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


SAMPLES: list[dict[str, Any]] = [
    {"id": "s0", "image": NAMES[0], "conversations": [
        turn("human", "<image>\nWhat is it?"), turn("gpt", "A card."), turn("human", "Its colour?"), turn("gpt", "Red.")]},
    {"id": "s1", "image": list(NAMES), "conversations": [
        turn("human", "<image>\n<image>\nWhich is grey?"), turn("gpt", "The second.")]},
    {"id": "s2", "conversations": [turn("human", "Is it raining?"), turn("gpt", "No.")]},
    {"id": "s3", "image": NAMES[1], "conversations": [
        turn("system", "Be brief."), turn("human", "<image>\nA card?"), turn("gpt", "Yes.")]},
]  # fmt: skip


class Form(NamedTuple):
    """How samples are written; `holds` are the samples that the form can hold."""

    write: Callable[[Path, list[dict[str, Any]]], Path | str]
    holds: tuple[int, ...] = ALL


def images_of(sample: dict[str, Any]) -> list[str]:
    image = sample.get("image", [])
    return [image] if isinstance(image, str) else image


def rounds(sample: dict[str, Any], *, bare: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The system text, and questions with their answers; `bare` without placeholders."""
    turns = sample["conversations"]
    system = turns[0]["value"] if turns[0]["from"] == "system" else ""
    texts = [entry["value"].replace("<image>\n", "") if bare else entry["value"] for entry in turns[bool(system) :]]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def inside(name: str) -> dict[str, Any]:
    return {"bytes": IMAGES[name], "path": None}


def text_file(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_text(content, encoding=encoding)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[entry["from"]], "content": entry["value"]} for entry in sample["conversations"]]


def as_parts(sample: dict[str, Any], url: Callable[[str], str]) -> list[dict[str, Any]]:
    """OpenAI's messages: images as parts before the text."""
    names = iter(images_of(sample))
    messages = []
    for entry in as_messages(sample):
        text = entry["content"].replace("<image>\n", "")
        parts = [
            {"type": "image_url", "image_url": {"url": url(next(names))}}
            for _ in range(entry["content"].count("<image>"))
        ]
        messages.append({"role": entry["role"], "content": [*parts, {"type": "text", "text": text}]})
    return messages


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(IMAGES[name]).decode()


# Files of records


def write_list(folder: Path, samples: list[Any]) -> Path:
    return text_file(folder / "data.json", json.dumps(samples))


def write_rows(rows: Callable[[dict[str, Any]], Any]) -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(folder: Path, samples: list[dict[str, Any]]) -> Path:
        return text_file(folder / "data.jsonl", lines([rows(sample) for sample in samples]))

    return write


def swift(sample: dict[str, Any]) -> dict[str, Any]:
    system, pairs = rounds(sample)
    *history, (query, response) = pairs
    return {"id": sample["id"], "query": query, "response": response, "history": history, "system": system,
            "images": images_of(sample)}  # fmt: skip


def alpaca(sample: dict[str, Any]) -> dict[str, Any]:
    system, pairs = rounds(sample, bare=False)
    *history, (question, answer) = pairs
    first, _, rest = question.rpartition("\n")
    return {"instruction": first, "input": rest, "output": answer, "history": history, "system": system,
            "images": images_of(sample)} if first else {"instruction": question, "output": answer, "history": history,
            "system": system, "images": images_of(sample)}  # fmt: skip


def cauldron(sample: dict[str, Any]) -> dict[str, Any]:
    return {"images": [inside(name) for name in images_of(sample)],
            "texts": [{"user": user, "assistant": assistant} for user, assistant in rounds(sample)[1]]}  # fmt: skip


def question_answer(sample: dict[str, Any]) -> dict[str, Any]:
    system, ((question, answer),) = rounds(sample)
    return {"question": question, "answers": [answer, "other", answer], "image": images_of(sample), "system": system}


def trl(sample: dict[str, Any]) -> dict[str, Any]:
    *prompt, last = as_messages(sample)
    return {"prompt": prompt, "completion": [last], "images": images_of(sample)}


def chosen(sample: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": as_messages(sample), "images": images_of(sample)}


def write_table(folder: Path, rows: list[Any], name: str = "data.parquet") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=3)
    return folder / name


def table_row(sample: dict[str, Any]) -> dict[str, Any]:
    return {"id": sample["id"], "images": [inside(name) for name in images_of(sample)],
            "conversations": sample["conversations"]}  # fmt: skip


def write_saved_to_disk(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """As `datasets.DatasetDict.save_to_disk` writes it, in two files."""
    import pyarrow as pa

    split = folder / "saved" / "train"
    split.mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    table = pa.Table.from_pylist([table_row(sample) for sample in samples])
    names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pa.OSFile(str(split / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (split / "dataset_info.json").write_text("{}")
    return folder / "saved"


def write_shards(folder: Path, samples: list[dict[str, Any]]) -> Path:
    data = folder / "shards" / "data"
    data.mkdir(parents=True)
    for number, part in enumerate((samples[:1], samples[1:])):
        write_table(data, [table_row(sample) for sample in part], f"train-{number:05}-of-00002.parquet")
    write_table(data, [table_row(samples[0])], "test-00000-of-00001.parquet")
    (folder / "shards" / "README.md").write_text("# A data set")
    return folder / "shards"


def tar_members(sample: dict[str, Any], number: int) -> dict[str, bytes]:
    members = {f"d/{number:04}.{at}.png": IMAGES[name] for at, name in enumerate(images_of(sample))}
    return {**members, f"d/{number:04}.json": json.dumps({"conversations": sample["conversations"]}).encode()}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def write_webdataset(folder: Path, samples: list[dict[str, Any]]) -> str:
    for number, sample in enumerate(samples):
        write_tar(folder / f"shard-{number:06}.tar", tar_members(sample, number))
    return f"{folder}/shard-{{000000..{len(samples) - 1:06}}}.tar"


def write_energon(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """Of the class VQASample, the text in a list of turns."""
    members: dict[str, bytes] = {}
    for number, sample in enumerate(samples):
        ((question, answer),) = rounds(sample)[1]
        members |= {f"{number}.jpg": IMAGES[images_of(sample)[0]],
                    f"{number}.json": json.dumps([turn("human", question), turn("gpt", answer)]).encode()}  # fmt: skip
    write_tar(folder / "energon" / "parts" / "data-0.tar", members)
    write_tar(folder / "energon" / "parts" / "held-out.tar", members)
    meta = folder / "energon" / ".nv-meta"
    meta.mkdir()
    (meta / "split.yaml").write_text("split_parts:\n  train: ['parts/data-{0..0}.tar']\n  val: [parts/held-out.tar]\n")
    (meta / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: VQASample}\n"
        "field_map: {image: jpg, context: 'json[0][value]', answers: 'json[1][value]'}\n"
    )
    return folder / "energon"


def write_next_mixture(folder: Path, samples: list[dict[str, Any]]) -> Path:
    text_file(folder / "a.json", json.dumps(samples[:1]))
    text_file(folder / "b.jsonl", lines([*samples[1:], samples[0]]))
    return text_file(
        folder / "next.yaml",
        f"datasets:\n  - json_path: {folder}/a.json\n    sampling_strategy: all\n"
        f"  - json_path: b.jsonl\n    sampling_strategy: first:{len(samples) - 1}\n",
    )


def write_braces(folder: Path, samples: list[dict[str, Any]]) -> str:
    text_file(folder / "a.json", json.dumps(samples[:1]))
    text_file(folder / "c.json", json.dumps(samples[1:]))
    return f"{folder}/{{a,c}}.json"


def write_zstd(folder: Path, samples: list[dict[str, Any]]) -> Path:
    import pyarrow as pa

    with pa.CompressedOutputStream(str(folder / "data.jsonl.zst"), "zstd") as file:
        file.write(lines(samples).encode())
    return folder / "data.jsonl.zst"


def write_gzip(folder: Path, samples: list[dict[str, Any]]) -> Path:
    (folder / "data.json.gz").write_bytes(gzip.compress(json.dumps(samples).encode()))
    return folder / "data.json.gz"


def write_tar_gz(folder: Path, samples: list[dict[str, Any]]) -> Path:
    members: dict[str, bytes] = {}
    for number, sample in enumerate(samples):
        members |= tar_members(sample, number)
    plain = write_tar(folder / "data.tar", members)
    (folder / "data.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return folder / "data.tar.gz"


def write_vqa(folder: Path, samples: list[dict[str, Any]]) -> Path:
    questions, annotations = [], []
    for number, sample in enumerate(samples):
        ((question, answer),) = rounds(sample)[1]
        questions.append(
            {"question_id": number, "image_id": images_of(sample)[0].partition(".")[0], "question": question}
        )
        annotations.append({"question_id": number, "multiple_choice_answer": answer, "answers": [{"answer": answer}]})
    text_file(folder / "v2_mscoco_train2014_annotations.json", json.dumps({"annotations": annotations[::-1]}))
    return text_file(
        folder / "v2_OpenEnded_mscoco_train2014_questions.json", json.dumps({"info": {}, "questions": questions})
    )


FORMS: dict[str, Form] = {
    "LLaVA, a list": Form(write_list),
    "LLaVA, lines": Form(write_rows(lambda sample: sample)),
    "LLaVA in UTF-16": Form(lambda folder, samples: text_file(folder / "data.json", json.dumps(samples), "utf-16")),
    "LLaVA under 'data'": Form(
        lambda folder, samples: text_file(folder / "data.json", json.dumps({"version": 1, "data": samples}, indent=1))
    ),
    "ShareGPT, a system text beside the turns": Form(
        write_rows(
            lambda sample: {
                **sample,
                "system": rounds(sample)[0],
                "images": images_of(sample),
                "image": None,
                "conversations": [entry for entry in sample["conversations"] if entry["from"] != "system"],
            }
        )
    ),
    "role and content under 'conversations'": Form(
        write_rows(lambda sample: {**sample, "conversations": as_messages(sample)})
    ),
    "turns as JSON in a column": Form(
        lambda folder, samples: write_table(
            folder, [{**table_row(sample), "conversations": json.dumps(sample["conversations"])} for sample in samples]
        )
    ),
    "messages, images beside them": Form(
        write_rows(lambda sample: {"messages": as_messages(sample), "images": images_of(sample)})
    ),
    "OpenAI, paths in parts": Form(write_rows(lambda sample: {"messages": as_parts(sample, str)})),
    "OpenAI, data: URLs": Form(write_rows(lambda sample: {"messages": as_parts(sample, data_url)})),
    "images in base64": Form(
        write_rows(
            lambda sample: {**sample, "image": [base64.b64encode(IMAGES[name]).decode() for name in images_of(sample)]}
        )
    ),
    "ms-swift, query and response": Form(write_rows(swift)),
    "LLaMA-Factory, instruction and output": Form(write_rows(alpaca)),
    "The Cauldron, FineVision": Form(
        lambda folder, samples: write_table(folder, [cauldron(sample) for sample in samples]), holds=(0, 1, 2)
    ),
    "question and answers": Form(write_rows(question_answer), holds=(1, 2, 3)),
    "TRL, prompt and completion": Form(write_rows(trl)),
    "TRL, chosen": Form(write_rows(chosen)),
    "parquet": Form(lambda folder, samples: write_table(folder, [table_row(sample) for sample in samples])),
    "a folder of parquet shards": Form(write_shards),
    "datasets.save_to_disk": Form(write_saved_to_disk),
    "WebDataset": Form(write_webdataset),
    "WebDataset, compressed": Form(write_tar_gz),
    "Megatron-Energon": Form(write_energon, holds=(3,)),
    "VQA, two files": Form(write_vqa, holds=(3,)),
    "LLaVA-NeXT's mixture": Form(write_next_mixture),
    "LLaVA-NeXT's braces": Form(write_braces),
    "gzip": Form(write_gzip),
    "zstd": Form(write_zstd),
}
