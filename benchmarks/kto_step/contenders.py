"""Who takes part: a name, a few settings, and who it is compared with. Add one by adding a line."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """Which worker runs a contender."""

    TRL = "TRL"
    OURS = "nemo_kto"
    ALIGNER = "NeMo-Aligner's algorithm"


@dataclass(frozen=True)
class Contender:
    """One way of doing the step.

    Attributes:
        name: what it is asked for by.
        title: its row in the table.
        kind: which worker runs it.
        baseline: name of the contender it is divided by.
        bf16: bfloat16 products; else float32.
        overrides: its own settings: ``nemo-kto train`` overrides, or words of TRL's worker.
        prepare: arguments of a ``nemo-kto`` command that runs once before it, with the same overrides; its cost is
            reported apart.
        environment: variables of its process.
        period: steps over which its cost repeats. Costs are compared as means over whole periods.
        ranks: data-parallel processes.
        threads: of each process.
        rows: samples per optimizer step.
        remakes_logits: whether its backward pass projects onto the vocabulary once more (see flops.py).
    """

    name: str
    title: str
    kind: Kind = Kind.OURS
    baseline: str = "trl-fp32"
    bf16: bool = False
    overrides: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    period: int = 1
    ranks: int = 1
    threads: int = 2
    rows: int = 8
    remakes_logits: bool = False


# glibc gives freed memory back to the system at once, and every step then pays for fresh pages; these keep it
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "268435456",
}
_TRL = {"kind": Kind.TRL, "remakes_logits": True}
_BF16 = {"bf16": True, "baseline": "trl-bf16"}
_PADDED = ("model.data.packing=false",)
_CACHE = ("model.kto.reference=cache",)
_AHEAD = ("model.kto.reference_lookahead=8",)
_HOST = ("model.kto.reference_restore=host",)
_LORA = ("model.peft.peft_scheme=lora", "model.optim.lr=2e-4")
_FILL = ("cache-reference",)
_ALONE = {"threads": 1, "baseline": "dp1"}

CONTENDERS = (
    Contender("trl-fp32", "TRL", **_TRL),
    Contender("trl-fp32-precompute", "TRL, reference scored in advance", overrides=("precompute",), **_TRL),
    Contender("trl-fp32-malloc", "TRL, glibc told to keep memory", environment=_KEEP_MEMORY, **_TRL),
    Contender("aligner-fp32", "NeMo-Aligner's algorithm", Kind.ALIGNER, overrides=_PADDED),
    Contender("ours-fp32", "nemo_kto"),
    Contender("ours-fp32-cache", "nemo_kto, reference cached", overrides=_CACHE, prepare=_FILL),
    Contender("ours-fp32-lookahead", "nemo_kto, one swap for 8 steps", overrides=_AHEAD, period=8),
    Contender("ours-fp32-padded", "nemo_kto, without packing", overrides=_PADDED),
    Contender("ours-fp32-malloc", "nemo_kto, glibc left alone", environment={"GLIBC_TUNABLES": ""}),
    Contender("ours-fp32-active", "nemo_kto, threads wait actively", environment={"OMP_WAIT_POLICY": "ACTIVE"}),
    Contender("ours-fp32-host", "nemo_kto, policy waits in host memory", overrides=_HOST),
    Contender("ours-fp32-lora", "nemo_kto, LoRA", overrides=_LORA),
    Contender("trl-bf16", "TRL", **_TRL, **_BF16),
    Contender("trl-bf16-precompute", "TRL, reference scored in advance", overrides=("precompute",), **_TRL, **_BF16),
    Contender("trl-bf16-weights", "TRL, no float32 masters", overrides=("bf16_weights",), **_TRL, **_BF16),
    Contender("aligner-bf16", "NeMo-Aligner's algorithm", Kind.ALIGNER, overrides=_PADDED, **_BF16),
    Contender("ours-bf16", "nemo_kto", **_BF16),
    Contender("ours-bf16-cache", "nemo_kto, reference cached", overrides=_CACHE, prepare=_FILL, **_BF16),
)
"""The comparison, in the order of the table."""

SCALING = (
    Contender("dp1", "1 rank, 8 samples", **_ALONE),
    Contender("dp2", "2 ranks, 16 samples", ranks=2, rows=16, **_ALONE),
)
"""Weak scaling: twice the samples on twice the ranks, one thread each."""


def chosen(names: list[str] | None) -> list[Contender]:
    """Contenders by name, each with its baseline; without names the whole comparison.

    Raises:
        SystemExit: there is no contender of that name.
    """
    known = {contender.name: contender for contender in (*CONTENDERS, *SCALING)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"error: no contender {unknown[0]}; there are {', '.join(known)}")
    if names is None:
        return list(CONTENDERS)
    wanted = {*names, *(known[name].baseline for name in names)}
    return [contender for contender in known.values() if contender.name in wanted]


def groups(contenders: list[Contender], resident: int) -> list[list[Contender]]:
    """Those who take turns in one run: a baseline and at most ``resident`` - 1 that are compared with it.

    All of a group are in memory at the same time. A baseline runs again in every group of its own.
    """
    formed = []
    for baseline in contenders:
        others = [c for c in contenders if c.baseline == baseline.name and c is not baseline]
        if baseline.baseline == baseline.name:
            room = max(resident - 1, 1)
            starts = range(0, len(others), room) if others else [0]
            formed += [[baseline, *others[start : start + room]] for start in starts]
    return formed
