"""docs/sizing.md shows what the command prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemo_kto.cli.main import main
from nemo_kto.planning.request import GB

TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "sizing.md").read_text(encoding="utf-8")
COMMON = re.search(r"`nemo-kto (plan [^`]*)` and its options", TEXT)[1].split()
ROWS = [
    [cell.strip(" `") for cell in line.strip("| ").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| .*`--model", line)
]
BLOCKS = re.findall(r"```console\n\$ nemo-kto (.*)\n((?:.*\n)*?)```", TEXT)


def test_there_is_something_to_check():
    assert {row[0].split("B")[0] for row in ROWS} == {"7", "13", "70"}
    assert BLOCKS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_a_row_is_the_commands_first_choice(row, capsys):
    assert main([*COMMON, *row[1].split(), "--json", "--top", "1"]) == 0
    (first,) = json.loads(capsys.readouterr().out)["layouts"]
    rank = next(stage for stage in first["stages"] if stage["stage"] == first["fullest_stage"])
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    assert row[2:] == [
        f"{first['tp']} x {first['pp']} x {first['dp']}",
        "yes" if first["sequence_parallel"] else "no",
        first["recompute"] or "no",
        str(first["micro_batch_size"]),
        *(f"{rank[part] / GB:.1f}" for part in parts),
        f"{8 * max(stage['swap_host'] for stage in first['stages']) / GB:.0f}",
    ]


@pytest.mark.parametrize(("command", "output"), BLOCKS)
def test_a_block_is_what_its_command_prints(command, output, capsys):
    assert main(command.split()) == 0
    assert capsys.readouterr().out == output
