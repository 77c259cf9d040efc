"""`nemo-kto plan` as it is called: its table, its JSON, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nemo_kto.cli.main import main
from nemo_kto.config.load import load_config
from nemo_kto.planning.request import GB

SEVENTY = ["plan", "--model", "70b", "--nodes", "4", "--seq-length", "4096"]


def test_the_table_shows_layouts_and_the_overrides_of_the_first(capsys, tmp_path):
    assert main([*SEVENTY, "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "70.55 billion parameters on 4 x 8 GPUs of 80 GB (72.0 without the reserve of 10%)" in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:2] in ("1 ", "2 ", "3 ")][:3] == list("123")
    words = [line.strip(" \\") for line in out.splitlines() if line.startswith("  ") and "=" in line]
    start = [f"pretrained_checkpoint.restore_from_path={tmp_path}", "model.data.data_prefix.train=[t.jsonl]"]
    model = load_config([*start, *words]).model
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (8, 4)
    assert model.data.seq_length == 4096


def test_json_has_everything(capsys):
    assert main([*SEVENTY, "--json", "--top", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["memory"] == 80 * GB
    assert len(plan["layouts"]) == 2 < plan["fitting"] <= plan["evaluated"]
    first = plan["layouts"][0]
    assert first["tp"] * first["pp"] * first["dp"] == 32
    assert [stage["stage"] for stage in first["stages"]] == [0, 1, 3]
    for stage in first["stages"]:
        for part in ("weights", "gradients", "optimizer", "activations", "head", "swap_device", "swap_host"):
            assert isinstance(stage[part], int)
        assert stage["weights"] + stage["gradients"] + stage["optimizer"] + stage["activations"] < stage["total"]
    assert first["step_seconds"]["total"] == pytest.approx(
        sum(value for name, value in first["step_seconds"].items() if name != "total")
    )
    assert f"model.tensor_model_parallel_size={first['tp']}" in plan["overrides"]


def test_nothing_fits_ends_with_2_and_one_message(capsys):
    assert main(["plan", "--model", "70b", "--gpus", "8", "--gpu-memory", "24"]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "the least that any needs is" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "7b"], "--gpus"),
        (["--model", "7b", "--gpus", "0"], "at least 1"),
        (["--model", "7b", "--gpus", "abc"], "invalid whole_number value: 'abc'"),
        (["--model", "7b", "--gpus", "8", "--reserve", "1"], "must be in"),
        (["--model", "7b", "--gpus", "8", "--gpu-memory", "nan"], "above 0"),
        (["--gpus", "8"], "--model"),
    ],
)
def test_wrong_options_end_with_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_training_refuses_is_not_planned(capsys):
    assert main(["plan", "--model", "7b", "--gpus", "8", "--seq-length", "1"]) == 2
    assert "--seq-length 1 leaves no room for a prompt and a response" in capsys.readouterr().err


def test_options_that_would_do_nothing_are_refused(capsys):
    assert main(["plan", "--model", "7b", "--gpus", "8", "--adapter-dim", "4"]) == 2
    assert "--peft lora" in capsys.readouterr().err


def test_planning_needs_no_torch():
    code = (
        "import sys; from nemo_kto.cli.main import main; main(['plan', '--model', '8b', '--gpus', '8']); "
        "assert not {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
