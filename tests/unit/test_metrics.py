"""From sums to named means, each with its own denominator; and metrics.jsonl, which is always JSON."""

from __future__ import annotations

import json
import math
import resource

import pytest

from nemo_kto.objective.counts import BatchCounts
from nemo_kto.training.metrics import SUMS, MetricsFile, named_means, peak_memory_bytes

BETA = 0.2
ROW = {
    "loss": 0.75,
    "rewards_desirable": 6.0,
    "rewards_undesirable": -10.0,
    "logps_desirable": -30.0,
    "logps_undesirable": -75.0,
    "correct": 6.0,
    "kl_ref": 8 * 0.5,
}


def counts(desirable: int, undesirable: int, pairs: int = 7) -> BatchCounts:
    return BatchCounts(desirable + undesirable, desirable, undesirable, pairs, 1000)


def test_every_sum_is_used_with_its_own_denominator():
    assert set(ROW) == set(SUMS)
    assert named_means(ROW, counts(3, 5), BETA) == {
        "loss": 0.75,
        "kl": 0.5 / BETA,  # KL_ref is one number, added once per row
        "rewards/chosen": 2.0,
        "rewards/rejected": -2.0,
        "rewards/margins": 4.0,
        "rewards/accuracies": 0.75,
        "logps/chosen": -10.0,
        "logps/rejected": -15.0,
        "num_desirable": 3,
        "num_undesirable": 5,
        "kl_pairs": 7,
    }


@pytest.mark.parametrize(
    ("desirable", "undesirable", "undefined"),
    [
        (0, 8, {"rewards/chosen", "logps/chosen", "rewards/margins"}),
        (8, 0, {"rewards/rejected", "logps/rejected", "rewards/margins"}),
        (
            0,
            0,
            {
                *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
                *("logps/chosen", "logps/rejected", "kl"),
            },
        ),
    ],
)
def test_a_mean_over_no_row_is_none_and_nothing_else_is(desirable, undesirable, undefined):
    means = named_means(dict.fromkeys(SUMS, 0.0), counts(desirable, undesirable, pairs=0), BETA)
    assert {name for name, value in means.items() if value is None} == undefined


def test_a_mean_of_zero_is_not_undefined():
    means = named_means(dict.fromkeys(SUMS, 0.0), counts(4, 4), BETA)
    assert [value for value in means.values() if value is None] == []


def strict(text: str) -> dict:
    """JSON without Python's additions to it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(
        {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "lr": 1e-5, "step": 3, "rewards/chosen": None}
    )
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("\n")
    assert strict(line) == {
        "loss": None,
        "grad_norm": None,
        "kl": None,
        "lr": 1e-5,
        "step": 3,
        "rewards/chosen": None,
    }


def test_lines_are_appended_in_full_and_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start in (1, 3):  # a resumed run opens the file anew
        file = MetricsFile(path)
        for step in (start, start + 1):
            file.write({"step": step, "loss": 0.1 + 0.2})
            assert strict(path.read_text().splitlines()[-1]) == {"step": step, "loss": 0.1 + 0.2}
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_peak_memory_is_in_bytes():
    # this process holds torch: more than 50 MB, less than this machine has
    assert 50e6 < peak_memory_bytes() < 1e12


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile(path)
    for step in (1, 2):
        file.write({"step": step})
    assert caplog.text.count("metrics.jsonl cannot be written") == 1, "said once"
    path.unlink()
    file.write({"step": 3})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_no_half_line_is_left_where_a_disk_takes_a_part(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))  # writes beyond it fail, as on a full disk
    try:
        file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    file.write({"step": 3})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_resumed_run_drops_the_lines_that_it_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 2, "val/loss": 1}', '{"step": 3}', '{"step": 2}x', '{"ste']
    path.write_text("\n".join(lines))
    MetricsFile(path).go_back_to(2)
    assert path.read_text().splitlines() == lines[:3]
    MetricsFile(path).write({"step": 3})
    assert path.read_text().splitlines() == [*lines[:3], '{"step": 3}']


def test_a_run_that_begins_anew_sets_the_lines_before_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).go_back_to(0)
    for number in (1, 2):
        path.write_text(f'{{"step": {number}}}\n')
        MetricsFile(path).go_back_to(0)
        assert not path.exists()
        assert (tmp_path / f"metrics.before-{number}.jsonl").read_text() == f'{{"step": {number}}}\n'
