"""From records to token ids, with the tokenizer that the model brings. Not for files, processes or caches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kto.data.records import Message, Record
from nemo_kto.data.store import RowChunk
from nemo_kto.errors import CheckpointError

_MAX_TAIL = 4  # tokens that a template may put behind EOS: line ends


@dataclass(frozen=True)
class EncodeSettings:
    """The part of ``model.data`` that decides which tokens a record becomes."""

    seq_length: int
    append_eos: bool
    overlong: str


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a Hugging Face directory, offline and without running code that comes with it.

    Raises:
        CheckpointError: if the directory or its tokenizer is missing or broken.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a directory; want a Hugging Face directory that holds a tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the broken file provokes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} holds no usable tokenizer ({reason}); want tokenizer.json or tokenizer.model next to "
            "tokenizer_config.json, and no tokenizer that needs code of its own"
        ) from error


class _Texts(NamedTuple):
    prompt: str
    full: str
    is_chat: bool


class _Row(NamedTuple):
    ids: list[int]
    prompt_length: int
    merged: bool


@dataclass
class _ChunkBuilder:
    """The columns of a chunk while it grows."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    desirable: list[bool] = field(default_factory=list)
    record_index: list[int] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    response_keys: list[bytes] = field(default_factory=list)
    dropped_overlong: int = 0
    truncated: int = 0
    boundary_merges: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, row: _Row, prompt_key: bytes, record: Record, index: int) -> None:
        ids = np.asarray(row.ids, dtype=np.int32)
        self.ids.append(ids)
        self.lengths.append(ids.size)
        self.prompt_lengths.append(row.prompt_length)
        self.desirable.append(record.desirable)
        self.record_index.append(index)
        self.prompt_keys.append(prompt_key)
        self.response_keys.append(_key(row.ids[row.prompt_length :]))
        self.boundary_merges += row.merged

    def build(self, num_records: int) -> RowChunk:
        return RowChunk(
            ids=np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32),
            lengths=np.asarray(self.lengths, np.int64),
            prompt_lengths=np.asarray(self.prompt_lengths, np.int64),
            desirable=np.asarray(self.desirable, np.bool_),
            record_index=np.asarray(self.record_index, np.int64),
            prompt_keys=_stack(self.prompt_keys),
            response_keys=_stack(self.response_keys),
            num_records=num_records,
            dropped_overlong=self.dropped_overlong,
            truncated=self.truncated,
            boundary_merges=self.boundary_merges,
            problems=tuple(self.problems),
        )


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16).digest()


def _stack(keys: list[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


class Encoder:
    """Turns records into rows of ids.

    A row is the prompt followed by the response. Both are tokenised together and split where the tokens of the prompt
    alone end, so that the ids are those that the model would meet. A tokenizer that merges the last characters of the
    prompt with the first of the response makes the split fall before the merged token; the row is counted.

    Plain text gets the BOS that the tokenizer adds, unless it starts with one already. Chat messages get what the
    template writes and nothing else. With ``append_eos`` a response ends with exactly one EOS: one that is there stays
    (white space that a template writes behind it, which no policy ever generates, goes), else one is appended.
    """

    def __init__(self, tokenizer_path: str | Path, settings: EncodeSettings) -> None:
        self._path = tokenizer_path
        self._settings = settings
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._bos = self._find_bos()
        self._eos: int | None = self._tokenizer.eos_token_id
        if settings.append_eos and self._eos is None:
            raise CheckpointError(
                f"the tokenizer in {tokenizer_path} has no EOS token; set eos_token in its tokenizer_config.json, or "
                "model.data.append_eos=false if no response is to be closed"
            )

    def encode(self, records: Sequence[Record], first_index: int) -> RowChunk:
        """Encode ``records``, of which the first is number ``first_index`` of the data set (from 0)."""
        out = _ChunkBuilder()
        rendered = [(i, record, texts) for i, record in enumerate(records) if (texts := self._render(record, out))]
        prompts = self._tokenise([texts.prompt for _, _, texts in rendered])
        fulls = self._tokenise([texts.full for _, _, texts in rendered])
        for (i, record, texts), prompt_ids, full_ids in zip(rendered, prompts, fulls, strict=True):
            row = self._fit(self._split(texts, prompt_ids, full_ids), record, out)
            if row is not None:
                out.add(row, _key(prompt_ids), record, first_index + i)
        return out.build(len(records))

    def _find_bos(self) -> list[int]:
        """The ids that the tokenizer puts in front of a text by itself."""
        plain: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        special: list[int] = self._tokenizer("a")["input_ids"]
        starts = (k for k in range(len(special)) if special[k : k + len(plain)] == plain)
        return special[: next(starts, 0)]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _render(self, record: Record, out: _ChunkBuilder) -> _Texts | None:
        """The texts of prompt and prompt + response; None, and a problem, if the chat template refuses."""
        prompt, response = record.prompt, record.response
        if isinstance(prompt, str):
            assert isinstance(response, str)
            return _Texts(prompt, prompt + response, False)
        answer = (Message("assistant", response),) if isinstance(response, str) else response
        if self._tokenizer.chat_template is None:
            what = f"holds chat messages, but the tokenizer in {self._path} has no chat template"
            out.problems.append((record.where, f"{what}; want plain text, or a tokenizer of a chat model"))
            return None
        try:
            return _Texts(self._chat(prompt, True), self._chat(prompt + answer, False), True)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            what = f"the tokenizer's chat template refuses these messages ({error})"
            out.problems.append((record.where, f"{what}; want roles and an order that it accepts"))
            return None

    def _chat(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [message._asdict() for message in messages]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
        return str(text)

    def _split(self, texts: _Texts, prompt_ids: list[int], full_ids: list[int]) -> _Row:
        size = _common_prefix(prompt_ids, full_ids)
        merged = size < len(prompt_ids)
        bos = [] if texts.is_chat or full_ids[: len(self._bos)] == self._bos else self._bos
        if size + len(bos) == 0:
            # One token spans the whole prompt, so nothing would be left to predict the response from.
            cut = _common_prefix(texts.prompt, texts.full)
            size, full_ids = len(prompt_ids), prompt_ids + self._tokenise([texts.full[cut:]])[0]
        return _Row(self._close(bos + full_ids, len(bos) + size), len(bos) + size, merged)

    def _close(self, ids: list[int], prompt_length: int) -> list[int]:
        """``ids`` with one EOS at the end of the response, where settings ask for it and there is a response."""
        if not self._settings.append_eos or self._eos is None or len(ids) == prompt_length:
            return ids
        for end in range(len(ids), max(prompt_length, len(ids) - _MAX_TAIL - 1), -1):
            if ids[end - 1] == self._eos and not self._tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return [*ids, self._eos]

    def _fit(self, row: _Row, record: Record, out: _ChunkBuilder) -> _Row | None:
        """``row`` within the sequence length; None if it cannot be used."""
        limit, total = self._settings.seq_length, len(row.ids)
        if not 0 < row.prompt_length < total:
            what = "the response" if row.prompt_length else "the prompt"
            out.problems.append((record.where, f"the tokenizer makes no token of {what}; want text that it knows"))
            return None
        if total <= limit:
            return row
        if self._settings.overlong == "error":
            what = f"prompt ({row.prompt_length}) and response ({total - row.prompt_length}) make {total} tokens"
            want = f"want at most model.data.seq_length={limit}, or model.data.overlong=drop or truncate"
            out.problems.append((record.where, f"{what}; {want}"))
            return None
        if self._settings.overlong == "truncate" and row.prompt_length < limit:
            out.truncated += 1
            return row._replace(ids=row.ids[:limit])
        out.dropped_overlong += 1
        return None


def _common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    if second[: len(first)] == first:
        return len(first)
    return next(i for i, pair in enumerate(zip([*first, None], [*second, None], strict=False)) if pair[0] != pair[1])
