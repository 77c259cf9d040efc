"""The step benchmark's arithmetic: statistics and table from given numbers, and the formula of operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.kto_step.contenders import CONTENDERS, SCALING, Contender, Kind, chosen, groups
from benchmarks.kto_step.counting import Counting
from benchmarks.kto_step.crew import ROOT, merged
from benchmarks.kto_step.flops import Pass, Shape, pass_flops
from benchmarks.kto_step.report import table
from benchmarks.kto_step.settings import Settings
from benchmarks.kto_step.summary import per_period, ratios, spread, summarize

OURS = [c for c in (*CONTENDERS, *SCALING) if c.kind is not Kind.TRL]
SHAPE = Shape(layers=4, hidden=64, ffn=128, heads=4, groups=2, head_dim=16, vocab=399)  # tiny.SIZES


def step(contender, number, cpu, *, group=0, wall=1.0, loss=0.5, counted=False, **more):
    run = {"tokens": 100, "pad_tokens": 20, "squares": 1000, "positions": 50, "trains": False}
    return {
        "contender": contender,
        "group": group,
        "round": number,
        "counted": counted,
        "user_s": 0.75 * cpu,
        "sys_s": 0.25 * cpu,
        "wall_s": wall,
        "loss": loss,
        "kl": 0.0,
        "load": 2.0,
        "peak_bytes": 2_000_000_000 + number,
        "passes": [run],
        **more,
    }


def record(name, **changes):
    plain = dataclasses.asdict(Contender(name, name.upper(), baseline="base"))
    return {**plain, "kind": "nemo_kto", "shape": vars(SHAPE), "parameter_bytes": 1000, "once": None, **changes}


def test_a_spread_is_median_quartiles_and_extremes():
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.smallest, found.lower, found.median, found.upper, found.largest) == (1, 2, 3, 4, 5)
    assert found.count == 5
    assert dataclasses.astuple(spread([2.5])) == (2.5, 2.5, 2.5, 2.5, 2.5, 1)


def test_ratios_pair_the_same_round_of_the_same_group():
    base = [step("base", number, cost) for number, cost in enumerate([10.0, 20.0, 40.0])]
    base += [step("base", 0, 1000.0, group=1)]  # taken beside others
    own = [step("own", number, cost) for number, cost in enumerate([5.0, 5.0, 10.0])]
    assert ratios(own, base, 1, lambda s: s["user_s"]) == [0.5, 0.25, 0.25]


def test_a_cost_that_repeats_every_few_steps_is_a_mean_over_whole_periods():
    steps = [step("own", number, cost) for number, cost in enumerate([9.0, 1.0, 11.0, 3.0, 100.0])]
    steps.append(step("own", 5, 7.0, counted=True))  # an untimed step
    assert per_period(steps, 2, lambda s: s["user_s"] + s["sys_s"]) == {(0, 0): 5.0, (0, 2): 7.0}


def test_the_table_says_what_was_measured():
    base = [step("base", number, 10.0 + number) for number in range(3)]
    own = [step("own", n, (10.0 + n) / 4, loss=0.5 + n / 100, swap_bytes=3000) for n in range(3)]
    own.append(step("own", 3, 99.0, wall=99.0, counted=True, flops=2e9, collective_bytes=0))
    rows = [summarize(record("base", kind="TRL"), base, base), summarize(record("own"), own, base)]
    assert rows[1]["largest_loss_difference"] == pytest.approx(0.02)
    assert table(rows).splitlines()[4:6] == [
        "| BASE | 11.00 (10.50 to 11.50) | 1 | 8.25 | 2.75 | 1.00 | 100 (20.0 %) |  | 2.00 |",
        "| OWN | 2.75 (2.62 to 2.88) | 0.25 (0.25 to 0.25) | 2.06 | 0.69 | 1.00 | 100 (20.0 %) | 2 | 2.00 |",
    ]
    assert "OWN: 3.000 x parameter bytes moved per step" in table(rows)


def test_a_busy_machine_is_said():
    idle, busy = [step("base", 0, 1.0)], [step("base", 0, 1.0, load=4.0)]
    assert "others were using the machine" not in table([summarize(record("base"), idle, idle)])
    assert "load average 4.0: others were using the machine" in table([summarize(record("base"), busy, busy)])


def test_operations_that_the_formula_does_not_explain_are_said():
    own = [step("base", number, 1.0) for number in range(2)]
    own.append(step("base", 2, 1.0, counted=True, flops=1.5 * pass_flops(SHAPE, Pass(100, 20, 1000, 50, False))))
    assert "counted operations are 1.50 times the formula's" in table([summarize(record("base"), own, own)])


def test_weak_scaling_compares_positions_per_second_and_rank():
    one = [step("base", number, 1.0, wall=2.0) for number in range(3)]
    two = [step("two", number, 2.0, wall=2.5) for number in range(3)]
    two = [{**s, "passes": s["passes"] * 2} for s in two]
    assert summarize(record("two", ranks=2), two, one)["efficiency"]["median"] == pytest.approx(2.0 / 2.5)


def test_ranks_add_up_and_the_slowest_counts():
    one, other = step("own", 0, 4.0, wall=3.0), step("own", 0, 8.0, wall=5.0, loss=0.25)
    both = merged([one, other])
    assert (both["user_s"], both["wall_s"], both["loss"]) == (9.0, 5.0, 0.5)
    assert len(both["passes"]) == 2


def test_every_contender_runs_beside_its_baseline():
    formed = groups(list(CONTENDERS), resident=3)
    assert {c.name for group in formed for c in group} == {c.name for c in CONTENDERS}
    assert all(len(group) <= 3 and {c.baseline for c in group} == {group[0].name} for group in formed)
    assert [c.name for c in chosen(["ours-bf16"])] == ["trl-bf16", "ours-bf16"]
    with pytest.raises(SystemExit, match="no contender nobody"):
        chosen(["nobody"])


@pytest.mark.parametrize("contender", OURS, ids=lambda contender: contender.name)
def test_contenders_have_settings_that_exist(contender, tmp_path):
    from nemo_kto.config.checks import check
    from nemo_kto.config.load import load_config

    own = Settings(
        model=str(tmp_path),
        data="train.jsonl",
        out=str(tmp_path),
        bf16=contender.bf16,
        rows=contender.rows,
        ranks=contender.ranks,
        overrides=contender.overrides,
    )
    check(load_config(Settings.from_json(own.to_json()).hydra()), contender.ranks)


@pytest.mark.parametrize("trains", [False, True])
def test_the_formula_is_what_torch_counts(tiny_llama, trains):
    """Exactly: both count products alone. The rows are padded, as the network sees it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.arange(3 * 20).view(3, 20)
    counting = Counting()
    counting.start()
    with torch.set_grad_enabled(trains):
        loss = model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum()
        if trains:
            loss.backward()
    assert counting.stop()["flops"] == pass_flops(SHAPE, Pass(60, 0, 3 * 20**2, 60, trains))
    assert counting.stop() == {}  # nothing between two steps


def test_operations_of_a_batch_against_a_padded_block():
    """Counted by hand for two rows of 3 + 2 and 1 + 4 tokens: inputs of 4 and 4, pairs of 6 and 2, blocks of 6."""
    from benchmarks.kto_step.over_data import Lengths, ratios

    def total(*runs):
        return sum(
            pass_flops(SHAPE, Pass(tokens, 0, squares, scored, trains)) for tokens, squares, scored, trains in runs
        )

    theirs = total((24, 144, 24, True), (24, 144, 24, False))
    forward = total((12, 72, 12, True), (12, 72, 12, False), (24, 144, 24, False))
    responses = total((12, 72, 6, True), (12, 72, 6, False), (24, 144, 12, False))
    cached = total((8, 32, 6, True), (8, 40, 6, False))
    swap = cached + total((16, 72, 12, False))
    (found,) = ratios([Lengths(3, 2), Lengths(1, 4), Lengths(9, 9)], SHAPE, rows=2)
    assert found == pytest.approx([cost / theirs for cost in (forward, responses, swap, cached)], rel=1e-12)


def test_products_that_torch_does_not_count_are_counted():
    left, right, total = torch.ones(5, 7), torch.ones(7, 11), torch.zeros(5, 11)
    counting = Counting()
    counting.start()
    total.addmm_(left, right)
    if torch.backends.mkldnn.is_available():
        torch.ops.mkldnn._linear_pointwise(left, right.t().contiguous(), None, "none", [], "")
    products = 2 if torch.backends.mkldnn.is_available() else 1
    assert counting.stop()["flops"] == products * 2 * 5 * 7 * 11


def test_the_table_goes_between_its_marks(tmp_path):
    from benchmarks.kto_step.__main__ import _MARK_BEGIN, _MARK_END, _put

    page = tmp_path / "page.md"
    page.write_text(f"before\n{_MARK_BEGIN}\nold\n{_MARK_END}\nafter\n")
    _put("new\n", page)
    assert page.read_text() == f"before\n{_MARK_BEGIN}\nnew\n{_MARK_END}\nafter\n"
    assert _MARK_BEGIN in (ROOT / "README.md").read_text()
