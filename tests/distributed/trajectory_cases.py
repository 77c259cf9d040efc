"""What is trained in the trajectory tests, and in how many ways: recipes, and layouts by world size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trajectory import ADAM, PAPER, SGD

RECIPES = {
    "sgd": SGD,
    "adam": ADAM,
    "paper": PAPER,
    "paper_sgd_sft": replace(SGD, preset="kto_paper", lr=0.01, sft_weight=0.05),
    "averages": replace(ADAM, beta=2.0, average=True, sft_average=True, sft_weight=0.3),
    "apo": replace(ADAM, preset="apo_zero_unpaired"),
    "tied": replace(ADAM, tied=True),
    "tied_sgd": replace(SGD, tied=True, desirable_weight=1.0, undesirable_weight=1.0),
}
DIST = "model.optim.name=distributed_fused_adam"
OVERLAP_GRADS = "model.optim.overlap_grad_sync=true"
OVERLAP = (DIST, OVERLAP_GRADS, "model.optim.overlap_param_sync=true")
SEQUENCE = "model.sequence_parallel=true"
SELECTIVE = "model.activations_checkpoint_granularity=selective"
FULL = (
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
)
# The same objective said in other words: the preference weight multiplies both classes' weights.
HALVED = (
    "model.kto.preference_loss_weight=0.5",
    "model.kto.desirable_loss_weight=3.0",
    "model.kto.undesirable_loss_weight=2.5",
)
PADDED = "model.data.packing=false"  # the default packs
SCORE_4 = "model.kto.log_prob_forward_micro_batch_size=4"
AHEAD_2, AHEAD_3 = ("model.kto.reference_lookahead=2",), ("model.kto.reference_lookahead=3",)
"""Ten steps, two epochs, are windows of 2 2 2 2 2, and of 3 3 3 1: over the end of an epoch, and cut at the end."""
CACHE = "model.kto.reference=cache"


def layout_words(tp: int, pp: int, micro: int) -> list[str]:
    """The command line's words for how a recipe is computed."""
    return [
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"model.micro_batch_size={micro}",
    ]


@dataclass(frozen=True)
class Way:
    """How a recipe, which is named, is computed."""

    recipe: str
    tp: int = 1
    pp: int = 1
    micro: int = 2
    extra: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command line's words for it."""
        return [*layout_words(self.tp, self.pp, self.micro), *self.extra]


@dataclass(frozen=True)
class Case(Way):
    head_rows: int | None = None
    """Tokens per chunk of the LM head, so that there are many; None: as shipped, where this model has one."""

    def overrides(self, root: Path) -> list[str]:
        place = f"model.kto.reference_cache_dir={root / 'log-probs' / self.recipe}"
        return [*RECIPES[self.recipe].overrides(root), *self.words, place]


CASES = {
    1: {
        "mb1": Case("sgd", micro=1, extra=(PADDED,)),
        "mb2": Case("sgd"),
        "mb4": Case("sgd", micro=4),
        "mb2-score4": Case("sgd", extra=(SCORE_4,)),
        "mb2-padded-score4": Case("sgd", extra=(PADDED, SCORE_4)),
        "mb2-ahead": Case("sgd", extra=AHEAD_3),
        "mb2-score4-ahead": Case("sgd", extra=(SCORE_4, *AHEAD_2)),
        "mb2-selective": Case("sgd", extra=(SELECTIVE,)),
        "mb2-full": Case("sgd", extra=FULL),
        "adam-mb4": Case("adam", micro=4, extra=(PADDED,), head_rows=5),
        "dist-mb4": Case("adam", micro=4, extra=(DIST,)),
        "paper": Case("paper", extra=HALVED),
        "paper_sgd_sft-mb1": Case("paper_sgd_sft", micro=1),
        "averages": Case("averages", extra=(PADDED,)),
        "apo-mb4": Case("apo", micro=4, extra=(PADDED,)),
        "tied": Case("tied", extra=(PADDED, DIST)),
        "tied_sgd": Case("tied_sgd"),
    },
    2: {
        "dp2-mb1": Case("sgd", micro=1, extra=(PADDED,)),
        "dp2-paper": Case("paper"),
        "dp2-dist-overlap": Case("adam", micro=1, extra=OVERLAP),
        "dp2-dist-overlap-ahead": Case("adam", micro=1, extra=(*OVERLAP, *AHEAD_3)),
        "dp2-cache-ahead": Case("adam", extra=(DIST, CACHE, *AHEAD_2)),
        "dp2-apo": Case("apo", micro=1, extra=(PADDED,)),
        "dp2-averages": Case("averages", extra=(DIST, OVERLAP_GRADS)),
        "pp2-mb1": Case("sgd", pp=2, micro=1),
        "pp2-tied": Case("tied", pp=2, extra=(PADDED, DIST), head_rows=1),
        "pp2-tied_sgd": Case("tied_sgd", pp=2, micro=1),
        "pp2-paper-score4": Case("paper", pp=2, extra=(SCORE_4,)),
        "pp2-mb1-ahead": Case("sgd", pp=2, micro=1, extra=AHEAD_3),
        "pp2-ahead-head": Case("adam", pp=2, extra=AHEAD_3, head_rows=6),
        "pp2-full": Case("sgd", pp=2, micro=1, extra=FULL),
        "tp2-mb2": Case("sgd", tp=2, extra=(PADDED,)),
        "tp2-tied": Case("tied", tp=2, micro=4),
        "tp2-paper_sgd_sft": Case("paper_sgd_sft", tp=2, micro=1),
        "tp2-cache-head": Case("paper", tp=2, extra=(CACHE,), head_rows=6),
        "tp2sp-adam": Case("adam", tp=2, extra=(SEQUENCE,)),
        "tp2sp-averages": Case("averages", tp=2, micro=4, extra=(PADDED, SEQUENCE), head_rows=7),
        "tp2sp-sgd": Case("sgd", tp=2, extra=(SEQUENCE,)),
        "tp2sp-sgd-ahead": Case("sgd", tp=2, extra=(SEQUENCE, *AHEAD_2)),
        "tp2sp-full": Case("sgd", tp=2, extra=(SEQUENCE, *FULL)),
        "tp2sp-selective": Case("sgd", tp=2, extra=(SEQUENCE, SELECTIVE)),
    },
    4: {
        "dp4": Case("paper", extra=(PADDED, *OVERLAP)),
        "pp2dp2": Case("paper", pp=2, micro=1, extra=OVERLAP),
        "pp2dp2-tied_sgd": Case("tied_sgd", pp=2, extra=(OVERLAP_GRADS, SCORE_4)),
        "tp2dp2-sgd": Case("sgd", tp=2, extra=(PADDED, OVERLAP_GRADS)),
        "tp2spdp2-averages": Case("averages", tp=2, micro=4, extra=(SEQUENCE, *OVERLAP)),
        "tp2pp2-sgd": Case("sgd", tp=2, pp=2),
        "tp2pp2-adam": Case("adam", tp=2, pp=2, micro=4, extra=(PADDED, DIST)),
        "tp2pp2-paper_sgd_sft": Case("paper_sgd_sft", tp=2, pp=2, micro=4),
        "tp2pp2sp-tied": Case("tied", tp=2, pp=2, extra=(PADDED, SEQUENCE, *OVERLAP), head_rows=3),
        "tp2pp2sp-apo": Case("apo", tp=2, pp=2, micro=4, extra=(SEQUENCE,)),
    },
}
RECOMPUTED = [
    (1, "mb2", "mb2-selective"),
    (1, "mb2", "mb2-full"),
    (2, "pp2-mb1", "pp2-full"),
    (2, "tp2sp-sgd", "tp2sp-full"),
    (2, "tp2sp-sgd", "tp2sp-selective"),
]
"""Pairs of cases, by world size, that must agree in every bit."""
LOOKED_AHEAD = [(1, "mb2"), (1, "mb2-score4"), (2, "dp2-dist-overlap"), (2, "pp2-mb1"), (2, "tp2sp-sgd")]
"""Cases that have a twin which looks ahead."""
