"""From row numbers of a global batch to this rank's tensors, mismatched pairs included. Not for choosing the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_kto.data.batch import IGNORE, KTOBatch, Rows, StepBatch, join_packed, join_padded
from nemo_kto.data.fixed_pairs import NONE
from nemo_kto.data.plan import Plan, by_length, micro_batches_of_pipeline, packed
from nemo_kto.data.store import TokenStore
from nemo_kto.objective.counts import BatchCounts
from nemo_kto.objective.pairing import mismatched_partners

IntArray = NDArray[np.int64]
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is laid out over ranks and in memory.

    Attributes:
        dp_rank: this rank's place on the data-parallel axis.
        dp_size: length of that axis.
        micro_batch_size: samples per micro-batch. Packed: a micro-batch holds as many samples as fit into so many
            times ``seq_length`` tokens.
        pad_id: any valid token id.
        seq_length: longest row in tokens; a KL row loses the end of its response beyond it.
        pad_multiple: a micro-batch's positions are a multiple of it (of the tensor-parallel size, with sequence
            parallelism).
        needs_kl: whether the objective uses the mismatched pairs.
        packing: rows of a micro-batch one after the other, instead of padded to one length.
        stages: pipeline stages; packed micro-batches are made smaller to keep several stages busy.
        fixed_partners: [n] int64, for each row of the store its partner's, from
            :func:`~nemo_kto.data.fixed_pairs.fixed_partners`; None: partners are found within each global batch.
    """

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    pad_id: int
    seq_length: int
    pad_multiple: int
    needs_kl: bool
    packing: bool = False
    stages: int = 1
    fixed_partners: IntArray | None = field(default=None, compare=False)

    @property
    def capacity(self) -> int:
        """Tokens that a packed micro-batch holds."""
        return self.micro_batch_size * self.seq_length


def collate_step(store: TokenStore, indices: IntArray, layout: BatchLayout) -> StepBatch:
    """Build this data-parallel rank's share of one global batch.

    Pairing looks at the whole global batch, in its order, before anything is cut, unless partners are fixed: it
    depends on neither ranks nor micro-batches, and neither do the counts. Which samples share a micro-batch, and which
    rank gets it, is planned by length (:mod:`nemo_kto.data.plan`). Where samples are few (the last batch of
    validation) a share may be empty.

    A KL row is the sample's prompt and its partner's response, cut at ``seq_length``. A pair whose prompt leaves no
    room for a response does not count. Without a partner, and for every sample when ``needs_kl`` is false (then no
    pairing is done), the KL row is the first token alone: valid input with nothing to score. The last token of a
    response is a label but no input: it would predict nothing.

    Worked example. Three samples, prompts (1 2), (3), (4 5), responses (6 9), (7 8 9), (9), the second undesirable.
    Each is paired with the next, the last with the first. With ``pad_id`` 0 on one rank in one micro-batch:

    >>> import numpy as np
    >>> from dataclasses import replace
    >>> class Store:  # the parts of a TokenStore that are read
    ...     desirable = np.array([True, False, True])
    ...     prompt_lengths = np.array([2, 1, 2])
    ...     prompts, responses = [[1, 2], [3], [4, 5]], [[6, 9], [7, 8, 9], [9]]
    ...     def prompt(self, i): return np.array(self.prompts[i])
    ...     def response(self, i): return np.array(self.responses[i])
    ...     def prompt_key(self, i): return bytes(self.prompts[i])
    ...     def response_key(self, i): return bytes(self.responses[i])
    ...     def lengths(self, rows): return np.array([4, 4, 3])[rows]
    >>> layout = BatchLayout(
    ...     dp_rank=0, dp_size=1, micro_batch_size=3, pad_id=0, seq_length=4, pad_multiple=1, needs_kl=True)
    >>> step = collate_step(Store(), np.arange(3), layout)
    >>> batch = step.micro_batches[0]
    >>> batch.samples.tokens
    tensor([[1, 2, 6],
            [3, 7, 8],
            [4, 5, 0]])
    >>> batch.samples.labels  # what each position predicts, where that is a token of the response
    tensor([[-100,    6,    9],
            [   7,    8,    9],
            [-100,    9, -100]])
    >>> batch.kl_rows.tokens  # the first row loses its 9: seq_length is 4
    tensor([[1, 2, 7],
            [3, 0, 0],
            [4, 5, 6]])
    >>> batch.kl_rows.labels
    tensor([[-100,    7,    8],
            [   9, -100, -100],
            [-100,    6,    9]])
    >>> step.counts
    BatchCounts(num_samples=3, num_desirable=2, num_undesirable=1, num_kl_pairs=3, num_tokens=11, num_inputs=15, \
num_pads=3)

    The same, packed:

    >>> packed = collate_step(Store(), np.arange(3), replace(layout, packing=True)).micro_batches[0].samples
    >>> packed.tokens, packed.labels, packed.lengths
    (tensor([[1, 2, 6, 3, 7, 8, 4, 5]]), tensor([[-100,    6,    9,    7,    8,    9, -100,    9]]), (3, 3, 2))

    Args:
        store: the tokens.
        indices: [N] int64, rows of the whole global batch in global order, the same on every rank.
        layout: where this rank stands and how rows are padded.

    Returns:
        The micro-batches of this rank and the counts of the global batch.
    """
    partners = _partners(store, indices, layout)
    lengths = _input_lengths(store, indices, partners, layout)
    plan = _plan(lengths, layout)
    micro_batches = tuple(
        _micro_batch(store, indices[places], [partners[place] for place in places], layout)
        for places in plan[layout.dp_rank]
    )
    num_desirable = int(store.desirable[indices].sum())
    counts = BatchCounts(
        num_samples=len(indices),
        num_desirable=num_desirable,
        num_undesirable=len(indices) - num_desirable,
        num_kl_pairs=sum(partner is not None for partner in partners),
        num_tokens=int(store.lengths(indices).sum()),
        num_inputs=int(lengths.sum()),
        num_pads=_num_pads(lengths, plan, layout),
    )
    return StepBatch(micro_batches, counts)


def _partners(store: TokenStore, indices: IntArray, layout: BatchLayout) -> list[int | None]:
    """For each sample of the global batch the row of the store whose response it is paired with, if any."""
    if not layout.needs_kl:
        return [None] * len(indices)
    fixed = layout.fixed_partners
    found = _within(store, indices) if fixed is None else fixed[indices].tolist()
    has_room = store.prompt_lengths[indices] < layout.seq_length
    return [m if m not in (None, NONE) and room else None for m, room in zip(found, has_room, strict=True)]


def _within(store: TokenStore, indices: IntArray) -> list[int | None]:
    """Rows of the global batch itself as partners, in its order."""
    rows = [int(i) for i in indices]
    places = mismatched_partners([store.prompt_key(i) for i in rows], [store.response_key(i) for i in rows])
    return [None if m is None else rows[m] for m in places]


def _input_lengths(
    store: TokenStore, indices: IntArray, partners: Sequence[int | None], layout: BatchLayout
) -> IntArray:
    """[N, 2] positions of each sample's row and of its KL row, without padding."""
    samples = np.minimum(store.lengths(indices), layout.seq_length) - 1
    pairs = np.ones_like(samples)
    paired = np.array([partner is not None for partner in partners], dtype=bool)
    others = np.array([partner for partner in partners if partner is not None], dtype=np.int64)
    responses = store.lengths(others) - store.prompt_lengths[others]
    pairs[paired] = np.minimum(store.prompt_lengths[indices[paired]] + responses, layout.seq_length) - 1
    return np.stack([samples, pairs], axis=1).astype(np.int64)


def _plan(lengths: IntArray, layout: BatchLayout) -> Plan:
    if layout.packing:
        share = int(lengths[:, 0].sum()) // layout.dp_size
        return packed(lengths, layout.dp_size, layout.capacity, micro_batches_of_pipeline(share, layout.stages))
    return by_length(lengths, layout.dp_size, layout.micro_batch_size)


def _num_pads(lengths: IntArray, plan: Plan, layout: BatchLayout) -> int:
    """Positions that pad the rows of samples and the KL rows, over all ranks and micro-batches."""
    positions = 0
    for places in (places for share in plan for places in share):
        rows = lengths[places]
        entry = rows.sum(axis=0) if layout.packing else rows.max(axis=0)
        padded = -(-entry // layout.pad_multiple) * layout.pad_multiple
        positions += int(padded.sum()) * (1 if layout.packing else len(places))
    return positions - int(lengths.sum())


def _micro_batch(
    store: TokenStore, indices: IntArray, partners: Sequence[int | None], layout: BatchLayout
) -> KTOBatch:
    prompts = [store.prompt(int(i)) for i in indices]
    responses = [store.response(int(i)) for i in indices]
    nothing: Ids = np.zeros(0, dtype=np.int32)
    kl_responses = [nothing if m is None else store.response(m) for m in partners]
    return KTOBatch(
        samples=_rows(prompts, responses, layout),
        kl_rows=_rows(prompts, kl_responses, layout),
        desirable=torch.from_numpy(np.array(store.desirable[indices])),
        has_partner=torch.tensor([m is not None for m in partners]),
        index=torch.from_numpy(np.array(indices)),
    )


def _rows(prompts: Sequence[Ids], responses: Sequence[Ids], layout: BatchLayout) -> Rows:
    """Join rows, after cutting responses (never prompts) at the sequence length."""
    room = [max(layout.seq_length - len(prompt), 0) for prompt in prompts]
    rows = [_row(prompt, response[:space]) for prompt, response, space in zip(prompts, responses, room, strict=True)]
    join = join_packed if layout.packing else join_padded
    return join([tokens for tokens, _ in rows], [labels for _, labels in rows], layout.pad_multiple, layout.pad_id)


def _row(prompt: Ids, response: Ids) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one row, unpadded."""
    if not len(response):
        return torch.tensor([int(prompt[0])]), torch.tensor([IGNORE])
    tokens = np.concatenate([prompt, response[:-1]]).astype(np.int64)
    labels = np.full_like(tokens, IGNORE)
    labels[len(prompt) - 1 :] = response  # the last token of the prompt predicts the first of the response
    return torch.from_numpy(tokens), torch.from_numpy(labels)
