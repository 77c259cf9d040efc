"""``nemo-kto report``: what the reader makes of a metrics file, and what is written."""

from __future__ import annotations

import base64
import json
import re

import pytest

from nemo_kto.cli import main as entry
from nemo_kto.cli.curves import running_mean
from nemo_kto.cli.metrics_file import read_run
from nemo_kto.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n"


def train(step: int, **values: float | None) -> dict:
    return {"step": step, "consumed_samples": 8 * step, "loss": 1.0, "rewards/margins": 0.1 * step, **values}


def validation(step: int, **values: float | None) -> dict:
    return {"step": step, "val/loss": 0.9, "val/rewards/margins": 0.2, **values}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: dict | str, name: str = "metrics.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write_rows


def test_train_and_validation_rows(write):
    run = read_run(write(train(1), train(2, loss=0.5), validation(2), train(3, loss=None)))
    assert run.series("loss") == ([1, 2], [1.0, 0.5])
    assert run.series("loss", validation=True) == ([2], [0.9])
    assert run.series("rewards/margins", validation=True) == ([2], [0.2])
    assert run.series("kl") == ([], [])


def test_a_resumed_run_overwrites_what_it_repeats(write):
    before = [train(s, loss=1.0) for s in (1, 2, 3, 4)]
    run = read_run(write(*before, validation(4), train(3, loss=0.7)))
    assert run.series("loss") == ([1, 2, 3], [1.0, 1.0, 0.7])  # step 4 belongs to the abandoned run
    assert run.validation == {}


def test_a_repeated_validation_keeps_its_step(write):
    run = read_run(write(train(1), train(2), validation(2), train(3), validation(2, **{"val/loss": 0.8})))
    assert sorted(run.train) == [1, 2]
    assert run.series("loss", validation=True) == ([2], [0.8])


def test_half_a_line_is_skipped_with_a_warning(write, capsys):
    path = write(train(1), '{"step": 2, "lo', train(2), '{"step": 3')
    assert sorted(read_run(path).train) == [1, 2]
    err = capsys.readouterr().err
    assert f"{path}:2:" in err
    assert f"{path}:4:" in err


def test_nan_is_no_value(write):
    assert read_run(write(train(1, loss=float("nan")))).series("loss") == ([], [])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], ":1: holds no metrics"),
        (["not json"], ":1: holds no metrics"),
        ([{"prompt": "a", "label": True}], ":1: no integer 'step'"),
        ([train(1), "[1, 2]"], ":2: a JSON object"),
    ],
)
def test_what_is_no_metrics_file_is_refused_by_line(write, rows, message):
    with pytest.raises(DataError, match=re.escape(f"metrics.jsonl{message}")):
        read_run(write(*rows))


def test_missing_file_ends_with_3(tmp_path, capsys):
    assert entry.main(["report", "--metrics", str(tmp_path / "none.jsonl")]) == 3
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_writes_curves_and_one_self_contained_page(write, tmp_path, capsys):
    path = write(*[train(s) for s in range(1, 61)], validation(60))
    out = tmp_path / "out"
    assert entry.main(["report", "--metrics", str(path), "--out", str(out)]) == 0
    curves = (out / "curves.png").read_bytes()
    page = (out / "report.html").read_text()
    assert curves.startswith(PNG)
    assert base64.b64encode(curves).decode() in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<td>reward margin</td><td>+0.1000</td><td>+5.5500</td><td>+0.2000</td>" in page  # mean of 5.1 .. 6.0
    assert "<td>480</td>" in page
    assert str(out / "curves.png") in capsys.readouterr().out


def test_compares_runs_of_unlike_length_and_keys(write, tmp_path):
    first = write(*[train(s) for s in range(1, 5)])
    other = write(validation(2), name="other.jsonl")
    assert entry.main(["report", "--metrics", str(first), "--compare", str(other)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f"<h2>{tmp_path.parent.name}/{tmp_path.name}</h2>" in page
    assert "<h2>other</h2>" in page


def test_running_mean_is_centred_and_unbiased_at_the_ends():
    assert running_mean([1.0, 2.0, 3.0, 4.0, 5.0], 3) == pytest.approx([1.5, 2.0, 3.0, 4.0, 4.5])
