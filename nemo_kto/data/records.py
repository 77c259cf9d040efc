"""From files to validated records. Not for tokens: nothing heavy is imported, so that bad data is reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemo_kto.data.problems import Problems
from nemo_kto.data.readers import iter_values, locate, usable_files

ROLES = ("system", "developer", "user", "assistant", "tool")
SPELLINGS = (("response", "preference"), ("completion", "label"))
"""(response key, label key) of NeMo-Aligner and of TRL."""
_WANT_KEYS = "want prompt, response and preference, or prompt, completion and label"
_WANT_LABEL = 'want "chosen", "rejected", 1, 0, true or false'
_LABELS = {"chosen": True, "rejected": False}
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
_KINDS |= {list: "a list", dict: "an object", bytes: "binary data"}


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One judged response.

    Attributes:
        prompt: plain text, or chat messages of which the last is not the assistant's.
        response: plain text, or assistant messages (only after a chat prompt).
        desirable: whether the response was liked.
        file: where the record came from.
        number: its line (row, for parquet) in ``file``, from 1.
    """

    prompt: Text
    response: Text
    desirable: bool
    file: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)

    @property
    def where(self) -> str:
        """``file:line``, or ``file:row N``."""
        return locate(self.file, self.number)


class _RecordError(Exception):
    """What is wrong with one record, and what is wanted."""


def read_records(files: Sequence[str | Path]) -> list[Record]:
    """Read and check every record of ``files``, in order.

    Raises:
        DataError: if anything is wrong with any file or record: the first 20 problems as ``file:line: what is wrong;
            what is wanted``, and the number of the others.
    """
    return list(iter_records(files))


def iter_records(files: Sequence[str | Path]) -> Iterator[Record]:
    """Yield what :func:`read_records` returns without holding it in memory; raises after the last line.

    Nothing is yielded any more once a problem is known: the rest of the files is only checked.
    """
    problems = Problems("the data cannot be used; problems")
    for file in usable_files(files, problems):
        yield from _iter_file(file, problems)
    problems.raise_if_any()


def _iter_file(file: str, problems: Problems) -> Iterator[Record]:
    before, found = problems.count, False
    for number, value in iter_values(file, problems):
        found = True
        try:
            prompt, response, desirable = _check(value)
        except _RecordError as bad:
            problems.add(locate(file, number), str(bad))
            continue
        if not problems.count:
            yield Record(prompt, response, desirable, file, number)
    if not found and problems.count == before:
        problems.add(file, "holds only blank lines; want at least one record")


def _check(value: Any) -> tuple[Text, Text, bool]:
    if not isinstance(value, dict):
        raise _RecordError(f"is {_kind(value)}; want a JSON object with its keys in double quotes")
    response_key, label_key = _spelling(value)
    prompt = _text(value["prompt"], "prompt")
    response = _text(value[response_key], response_key)
    if isinstance(prompt, str) and not isinstance(response, str):
        raise _RecordError(
            f"{response_key} is a list of chat messages but prompt is a string; want both as chat messages"
        )
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise _RecordError("prompt ends with a message of the assistant, before its response; want another role last")
    if not isinstance(response, str) and (strange := next((m.role for m in response if m.role != "assistant"), None)):
        raise _RecordError(f"{response_key} has a message of role {strange!r} in what is scored; want only assistant")
    return prompt, response, _label(value[label_key], label_key)


def _spelling(value: dict[str, Any]) -> tuple[str, str]:
    """The keys of this record's response and label."""
    used = [s for s in SPELLINGS if any(key in value for key in s)]
    if len(used) > 1:
        mixed = ", ".join(key for s in SPELLINGS for key in s if key in value)
        raise _RecordError(f"mixes two spellings ({mixed}); {_WANT_KEYS}")
    response_key, label_key = used[0] if used else SPELLINGS[0]
    missing = [key for key in ("prompt", response_key, label_key) if key not in value]
    if missing:
        pair = (
            " (chosen and rejected: split the pair into two records)" if {"chosen", "rejected"} <= set(value) else ""
        )
        raise _RecordError(f"has no {' and no '.join(missing)}{pair}; {_WANT_KEYS}")
    return response_key, label_key


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _text(value: Any, key: str) -> Text:
    if isinstance(value, str):
        _check_string(value, key)
        if not value.strip():
            raise _RecordError(f"{key} is empty; want text, for {_reason(key)}")
        return value
    if not isinstance(value, list):
        raise _RecordError(f"{key} is {_kind(value)}; want a string or a list of chat messages")
    messages = tuple(_message(m, f"{key}[{i}]") for i, m in enumerate(value))
    if not any(m.content.strip() for m in messages):
        raise _RecordError(f"{key} is empty; want at least one message with text, for {_reason(key)}")
    return messages


def _reason(key: str) -> str:
    return "a response is judged given its prompt" if key == "prompt" else "an empty response has nothing to score"


def _message(value: Any, key: str) -> Message:
    if not isinstance(value, dict):
        raise _RecordError(f'{key} is {_kind(value)}; want {{"role": ..., "content": ...}}')
    for name in ("role", "content"):
        if not isinstance(value.get(name), str):
            what = f"{key}.{name} is {_kind(value[name])}" if name in value else f"{key} has no {name}"
            raise _RecordError(f"{what}; want a string")
    if value["role"] not in ROLES:
        raise _RecordError(f"{key}.role is {value['role']!r}; want {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    # A null is how parquet writes an absent key; anything else would be dropped in silence.
    extra = next((k for k, v in value.items() if k not in ("role", "content") and v is not None), None)
    if extra is not None:
        raise _RecordError(f"{key} has {extra!r}, which is not supported; want only role and content")
    _check_string(value["content"], f"{key}.content")
    return Message(value["role"], value["content"])


def _check_string(value: str, key: str) -> None:
    if value.isascii():
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RecordError(
            f"{key} holds half a surrogate pair (\\u{ord(value[error.start]):x}), which no tokenizer accepts; "
            "want whole characters"
        ) from None


def _label(value: Any, key: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value in _LABELS:
        return _LABELS[value]
    shown = repr(value) if isinstance(value, (str, int, float)) else _kind(value)
    raise _RecordError(f"{key} is {shown[:60]}; {_WANT_LABEL}")
