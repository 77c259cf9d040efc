"""Whether tokens are ids that the model has. Not for making them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_kto.data.places import RecordPlaces
from nemo_kto.data.store import TokenStore
from nemo_kto.errors import CheckpointError


def check_vocabulary(store: TokenStore, files: Sequence[str], vocab_size: int, model: str | Path) -> None:
    """Refuse tokens of another model's tokenizer: there is no row of the embedding for them.

    A tokenizer may know more tokens than the model, as long as the data hold none of them.

    Args:
        store: the rows.
        files: what they were read from, to name the record.
        vocab_size: number of the model's ids.
        model: directory with the tokenizer and config.json.

    Raises:
        CheckpointError: some token is no id of the model.
    """
    found = store.first_beyond(vocab_size)
    if found is None:
        return
    row, token = found
    (where,) = RecordPlaces(files).where([int(store.record_index[row])])
    raise CheckpointError(
        f"{where}: the tokenizer in {model} makes token {token} of this record, but the model has only the tokens "
        f"below {vocab_size} (vocab_size of its config.json): put the model's own tokenizer there"
    )
