"""Ask a language model to judge free-form answers, through any server with OpenAI's chat API.

In: answered questions of LLaVA-Bench or MM-Vet, and a judge. Out: rows with the raw reply, the judge's model and a hash of the
prompt, appended to a file as they come. A prompt whose hash is in the file is not sent again, so a file of reviews can be
scored without a judge. eval/tasks/judged.py scores the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava.cli.http_client import HttpFailureError, HttpReply, send
from llava.cli.program import ArgumentParser
from llava.errors import InputError, shortened
from llava.eval.files import Faults, find_file, read_json_object
from llava.eval.harness.answer_log import RowWriter, whole_lines
from llava.eval.metrics.gpt_review import NO_SCORE, pair_of, parse_score
from llava.eval.tasks.judged import mmvet_name, summarise_grades, summarise_reviews
from llava.eval.types import AnsweredQuestion, JsonRow, Scores

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULES = Path(__file__).resolve().parents[1] / "table" / "rule.json"
OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
REVIEWER = "gpt-4-0613"  # the model that compares answers
NUM_TRIES = 5

# MM-Vet's prompt as published: the judge completes the last cell of the last row.
MMVET_PROMPT = Path(__file__).resolve().parents[1] / "table" / "mmvet_prompt.txt"


@dataclass(frozen=True)
class Judge:
    """A server and its model. The key comes from the environment."""

    url: str  # up to and including /v1
    model: str
    timeout_s: float = 120.0

    def reply(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float) -> str:
        """Return one completion; a busy server or a broken connection is tried again after a pause.

        Raises:
            InputError: the server refuses, or does not answer in `NUM_TRIES` tries.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        url, key = f"{self.url.rstrip('/')}/chat/completions", os.environ.get(KEY_VARIABLE)
        for number in range(NUM_TRIES):
            pause = min(30.0, 0.5 * 2**number)
            try:
                reply = send(url, body, key=key, timeout_s=self.timeout_s)
                if reply.status == 200:
                    return _content(reply.json())
                reason = f"{reply.status} {shortened(reply.reason)}"
                if reply.status not in (408, 409, 429) and reply.status < 500:
                    raise InputError(f"the judge at {self.url} refuses: {reason}; {_detail(reply)}")
                pause = pause if reply.retry_after_s is None else reply.retry_after_s
            except HttpFailureError as error:
                reason = str(error)
            if number + 1 < NUM_TRIES:
                time.sleep(pause)
        raise InputError(f"the judge at {self.url} did not answer in {NUM_TRIES} tries; the last ended with: {reason}")


def _content(values: object) -> str:
    """The text of a completion; none is an empty one."""
    try:
        content = values["choices"][0]["message"]["content"]  # type: ignore[index]
    except (LookupError, TypeError):
        raise HttpFailureError(f"its reply has no answer in it: {shortened(repr(values))}") from None
    if not isinstance(content, str | None):
        raise HttpFailureError(f"its answer is {shortened(repr(content))}, and not a text")
    return content or ""


def _detail(reply: HttpReply) -> str:
    with contextlib.suppress(HttpFailureError, LookupError, TypeError):
        message = reply.json()["error"]["message"]  # type: ignore[index]
        if isinstance(message, str):
            return shortened(" ".join(message.split()), 500)
    return f"is {KEY_VARIABLE} set, and the model's name right?"


def default_url() -> str:
    return os.environ.get("OPENAI_BASE_URL", OPENAI)


def get_eval(content: str, max_tokens: int) -> str:
    """Ask the default judge to compare two answers as `content` says, and return its reply."""
    request = comparison_request({}, content, max_tokens)
    judge = Judge(default_url(), REVIEWER)
    return judge.reply(request.messages, max_tokens=request.max_tokens, temperature=request.temperature)


def add_judge_flags(parser: ArgumentParser, *, model: str | None) -> None:
    """Add --judge-url and --judge-model. With a default model the default server is OpenAI's, else there is no judge."""
    url = default_url() if model else None
    about = f"any server with OpenAI's API; the key is in {KEY_VARIABLE}; replies are kept"
    group = parser.add_argument_group("judge", about)
    group.add_argument("--judge-url", default=url, metavar="URL", help=f"its URL, up to /v1 (default: {url or 'none'})")
    group.add_argument("--judge-model", default=model, metavar="NAME", help=f"its model (default: {model or 'none'})")


def prompt_hash(messages: Sequence[Mapping[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(messages), ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class JudgeRequest:
    """One answer to judge: the row so far, the messages, and how the judge's reply becomes fields of the row."""

    row: JsonRow
    messages: list[dict[str, str]]
    read: Callable[[str], JsonRow]
    max_tokens: int = 1024
    temperature: float = 0.2


def review(requests: Sequence[JudgeRequest], judge: Judge | None, file: Path) -> list[JsonRow]:
    """Return the rows of all requests: from `file` where it has the same prompt, the others from the judge.

    Raises:
        InputError: an answer is not in `file`, and there is no judge.
    """
    rows = whole_lines(file)
    known = {(str(row["question_id"]), row["prompt_sha256"]): row for row in rows if "prompt_sha256" in row}
    # Reviews of the original have no hash and go by their question.
    unhashed = {str(row.get("question_id")): row for row in rows if "prompt_sha256" not in row}
    found = []
    with RowWriter(file) as out:
        for request in requests:
            question, digest = str(request.row["question_id"]), prompt_hash(request.messages)
            row = known.get((question, digest)) or unhashed.get(question)
            if row is None:
                if judge is None:
                    raise InputError(
                        f"the answer to {question!r} is not reviewed in {str(file)!r}; give --judge-url and --judge-model"
                    )
                content = judge.reply(request.messages, max_tokens=request.max_tokens, temperature=request.temperature)
                row = {
                    **request.row, "content": content, **request.read(content), "judge": judge.model, "prompt_sha256": digest,
                }  # fmt: skip
                out.write(row)
            found.append(row)
    return found


# --- pairs of answers, as LLaVA-Bench has them ----------------------------------------------------------------------


def read_rules(file: Path = RULES) -> dict[str, dict[str, str]]:
    return read_json_object(file, "file of the judge's rules")


def comparison(question: str, answers: Sequence[str], rule: Mapping[str, str], context: str | None = None) -> str:
    """Format what the judge reads: the image in words, the question, both answers, and its instructions."""
    role = rule["role"]
    parts = [f"[Context]\n{context}\n\n"] if context is not None else []
    parts.append(f"[Question]\n{question}\n\n")
    for number, text in enumerate(answers, start=1):
        parts.append(f"[{role} {number}]\n{text}\n\n[End of {role} {number}]\n\n")
    return "".join([*parts, f"[System]\n{rule['prompt']}\n\n"])


def comparison_request(row: JsonRow, content: str, max_tokens: int = 1024) -> JudgeRequest:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return JudgeRequest(row, messages, lambda reply: {"tuple": parse_score(reply)}, max_tokens)


def llava_bench_requests(answered: Sequence[AnsweredQuestion], faults: Faults) -> list[JudgeRequest]:
    rules = read_rules()
    requests = []
    for number, one in enumerate(answered, start=1):
        question = one.question
        if one.text is None:
            continue
        if question.answer is None or question.extra.get("caption") is None:
            lacking = "answers_gpt4.jsonl or context.jsonl lacks them; left out"
            faults.add("questions without reference", lacking, repr(question.id))
            continue
        category = f"llava_bench_{question.category}"
        caption = question.extra["caption"]
        context = "\n".join(caption) if isinstance(caption, list) else caption
        content = comparison(question.prompt, [question.reference, one.text], rules[category], context)
        requests.append(comparison_request({"id": number, "question_id": question.id, "category": category}, content))
    return requests


# --- grades, as MM-Vet has them -------------------------------------------------------------------------------------


def mmvet_requests(answered: Sequence[AnsweredQuestion], faults: Faults) -> list[JudgeRequest]:
    instructions = MMVET_PROMPT.read_text(encoding="utf-8")
    requests = []
    for one in answered:
        if one.text is None:
            continue
        if one.question.answer is None:
            faults.add("questions without reference", "mm-vet.json lacks them; left out", repr(one.question.id))
            continue
        truth = one.question.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        content = instructions + "\n" + " | ".join([one.question.extra["question"], truth, one.text, ""])
        messages = [{"role": "user", "content": content}]
        row = {"question_id": mmvet_name(one.question.id)}
        requests.append(
            JudgeRequest(row, messages, lambda reply: {"grade": parse_grade(reply)}, max_tokens=3, temperature=0.0)
        )
    return requests


def parse_grade(reply: str) -> float | None:
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


# --- both -----------------------------------------------------------------------------------------------------------


def judge_answers(
    kind: str, answered: Sequence[AnsweredQuestion], home: Path, judge: Judge | None, file: Path, faults: Faults
) -> Scores:
    """Judge the answers of a task ("llava-bench" or "mmvet") and score the reviews.

    `file` holds the reviews: it is read, and appended to. Verdicts are the grade of each question, or a tenth of its score.
    """
    if kind == "llava-bench":
        rows = review(llava_bench_requests(answered, faults), judge, file)
        scores = summarise_reviews(rows, faults)
        worth = {row["question_id"]: pair_of(row)[1] / 10 for row in rows if pair_of(row) != NO_SCORE}
        return replace(scores, verdicts=[worth.get(one.question.id) for one in answered])
    rows = review(mmvet_requests(answered, faults), judge, file)
    for row in rows:
        if row["grade"] is None:
            faults.add("replies without a grade", "no number from 0 to 1; they count as 0", repr(row["question_id"]))
    data = read_json_object(find_file(home, ("mm-vet.json", "mm-vet/mm-vet.json"), "file of MM-Vet's answers"))
    names = [mmvet_name(one.question.id) for one in answered]
    grades = {row["question_id"]: [row["grade"] or 0.0] for row in rows}
    scores = summarise_grades(grades, {name: data[name] for name in names if name in data}, faults)
    return replace(scores, verdicts=[grades[name][0] if name in grades else None for name in names])
