"""A reference that remembers: rows it has met are told from the cache, others are scored once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kto.data.batch import Rows, regroup, split_rows
from nemo_kto.distributed.collectives import reduce_sums
from nemo_kto.distributed.groups import ParallelGroups
from nemo_kto.reference.base import Reference
from nemo_kto.reference.log_prob_store import LogProbStore
from nemo_kto.reference.row_keys import RowKey, row_key


class CachedReference:
    """A :class:`~nemo_kto.reference.base.Reference` in front of another one, which is asked only for what is new.

    One rank of each model replica looks rows up and writes new ones; it broadcasts what it knows to the others. The
    reference is entered by all ranks of the job or by none, because that may take exchanges between replicas.

    Groups of rows of which nothing is known are scored as they are: an entry's number is the one that scoring would
    give, bit for bit, on the layout that made it and among the same rows (with one row per forward, always). Where
    only some rows of a group are known the others are grouped anew. Otherwise numbers differ by rounding.

    Args:
        store: of this reference; None on ranks that do not speak for their replica.
        scorer: the same reference, which scores.
        groups: the layout.
    """

    def __init__(self, store: LogProbStore | None, scorer: Reference, groups: ParallelGroups) -> None:
        assert (store is not None) == groups.is_speaker
        self._store = store
        self._scorer = scorer
        self._groups = groups
        self.rows_asked = 0
        """Rows that were asked for since the start, over all ranks. A row without labels counts for none."""
        self.rows_computed = 0
        """Those of them that the cache did not have."""

    @property
    def store(self) -> LogProbStore | None:
        """Where this rank reads and writes; None where another does it for it."""
        return self._store

    def log_probs(self, rows: Sequence[Rows]) -> list[Tensor]:
        """See :class:`~nemo_kto.reference.base.Reference`."""
        keys = self._keys(rows)
        sizes = [len(split_rows([r])) for r in rows]
        known = self._share(self._look_up(keys), sum(sizes))
        if self._count(keys, known) > 0:
            found = self._score(rows, known.split(sizes))
            if self._groups.is_last_stage:
                known = self._keep(keys, known, found)
        return list(known.to(self._groups.device).split(sizes)) if self._groups.is_last_stage else []

    def flush(self) -> None:
        """Force what was written to the disk."""
        if self._store is not None:
            self._store.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        if self._store is not None:
            self._store.close()

    def _keys(self, rows: Sequence[Rows]) -> list[RowKey | None]:
        """Of every row, on the last stage; elsewhere nothing."""
        if not self._groups.is_last_stage:
            return []
        host = torch.device("cpu")
        return [row_key(row) for row in split_rows([r.to(host) for r in rows])]

    def _look_up(self, keys: Sequence[RowKey | None]) -> Tensor:
        """[n] float64: nats, 0 where there is nothing to score, NaN where a row is not known."""
        known = torch.zeros(len(keys), dtype=torch.float64)
        scored = [i for i, key in enumerate(keys) if key is not None]
        if self._store is not None and scored:
            known[scored] = torch.from_numpy(self._store.get([key for key in keys if key is not None]))
        return known

    def _share(self, known: Tensor, size: int) -> Tensor:
        """What the rank that speaks knows, in host memory, on all ranks of the replica."""
        if self._groups.model.size() == 1 or size == 0:
            return known
        shared = (known if self._groups.is_speaker else torch.zeros(size, dtype=torch.float64)).to(self._groups.device)
        dist.broadcast(shared, src=self._groups.speaker_rank, group=self._groups.model)
        return shared.cpu()

    def _count(self, keys: Sequence[RowKey | None], known: Tensor) -> int:
        """Rows that are missing anywhere: 0 on all ranks or on none."""
        mine = {"asked": 0.0, "missing": 0.0}
        if self._groups.is_speaker:
            mine = {"asked": float(sum(key is not None for key in keys)), "missing": float(known.isnan().sum())}
        everywhere = reduce_sums(mine, dist.group.WORLD, self._groups.device)
        self.rows_asked += int(everywhere["asked"])
        self.rows_computed += int(everywhere["missing"])
        return int(everywhere["missing"])

    def _score(self, rows: Sequence[Rows], known: Sequence[Tensor]) -> Tensor:
        """[n] float64 nats in host memory: as known, and where a row was missing, on the last stage, what it got."""
        groups, places = _to_score(rows, known)
        logps = self._scorer.log_probs(groups)
        scored = torch.cat(list(known)) if known else torch.zeros(0, dtype=torch.float64)
        if logps:
            scored[places] = torch.cat(logps).cpu()
        return scored

    def _keep(self, keys: Sequence[RowKey | None], known: Tensor, scored: Tensor) -> Tensor:
        """Write what was missing, each row once; a row that stands here twice gets one number."""
        new: dict[bytes, tuple[RowKey, float]] = {}
        for place in known.isnan().nonzero().flatten().tolist():
            key = keys[place]
            assert key is not None
            known[place] = new.setdefault(key.key, (key, float(scored[place])))[1]
        if self._store is not None:
            self._store.put(list(new.values()))
        return known


def _to_score(rows: Sequence[Rows], known: Sequence[Tensor]) -> tuple[list[Rows], list[int]]:
    """Groups of which nothing is known as they are, then the missing rows of others; and the place of each row."""
    groups: list[Rows] = []
    places: list[int] = []
    rest: list[Rows] = []
    places_of_rest: list[int] = []
    start = 0
    for entry, own in zip(rows, known, strict=True):
        missing = own.isnan()
        if missing.any() and (missing | (own == 0.0)).all():  # 0 where there is no label: nothing to know
            groups.append(entry)
            places += range(start, start + own.numel())
        else:
            singles = split_rows([entry])
            for i in missing.nonzero().flatten().tolist():
                rest.append(singles[i])
                places_of_rest.append(start + i)
        start += own.numel()
    size = max((own.numel() for own in known), default=1)
    return [*groups, *regroup(rest, size)], [*places, *places_of_rest]
