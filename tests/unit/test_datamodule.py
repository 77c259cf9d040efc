"""Loaders: order, resuming, workers, and what is said about unbalanced or lonely data."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from data_kit import make_store, random_rows

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.advice import class_balance_warning
from nemo_kto.data.batch import StepBatch
from nemo_kto.data.collate import BatchLayout
from nemo_kto.data.datamodule import (
    LoadedStep,
    StepDataset,
    StepLoader,
    StepSampler,
    train_loader,
    validation_loader,
    warn_of_imbalance,
)
from nemo_kto.data.sampler import GlobalBatchSampler

LAYOUT = BatchLayout(
    dp_rank=1,
    dp_size=2,
    micro_batch_size=2,
    pad_id=0,
    seq_length=32,
    pad_multiple=1,
    needs_kl=True,
    packing=True,
    stages=2,
)


def contents(step: StepBatch) -> tuple:
    batches = []
    for b in step:
        tensors = [b.samples.tokens, b.samples.labels, b.kl_rows.tokens, b.kl_rows.labels]
        columns = [t.tolist() for t in (*tensors, b.desirable, b.has_partner, b.index)]
        batches.append([*columns, b.samples.lengths, b.kl_rows.lengths])
    return batches, step.counts


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", random_rows(27))


@pytest.fixture
def sampler():
    return GlobalBatchSampler(27, 8, seed=3, shuffle=True)


def test_loader_follows_the_steps(store, sampler):
    dataset = StepDataset(store, sampler, LAYOUT)
    loader = train_loader(store, sampler, LAYOUT, total_steps=7)
    assert len(loader) == 7
    seen = [contents(step) for step in loader]
    assert seen == [contents(dataset[step]) for step in range(7)]
    assert all(isinstance(step, StepBatch) for step in loader)


def test_resumed_loader_has_the_full_length_and_the_rest_of_the_steps(store, sampler):
    whole = [contents(step) for step in train_loader(store, sampler, LAYOUT, total_steps=7)]
    for start in (0, 1, 4, 7):
        resumed = train_loader(store, sampler, LAYOUT, total_steps=7, start_step=start)
        assert len(resumed) == 7
        assert [contents(step) for step in resumed] == whole[start:]
        assert [contents(step) for step in resumed] == whole, "only the first iteration starts late"


def test_start_step_may_be_set_later():
    steps = StepSampler(5)
    unused = iter(steps)
    steps.start_step = 3
    assert list(steps) == [3, 4]
    assert list(unused) == [0, 1, 2, 3, 4]


def test_workers_change_nothing(store, sampler):
    alone = train_loader(store, sampler, LAYOUT, total_steps=6, start_step=2)
    two = train_loader(store, sampler, LAYOUT, total_steps=6, start_step=2, num_workers=2)
    whole = [contents(step) for step in train_loader(store, sampler, LAYOUT, total_steps=6)]
    assert [contents(s) for s in alone] == [contents(s) for s in two] == whole[2:]
    assert [contents(s) for s in two] == whole, "persistent workers, second iteration"
    two._iterator._shutdown_workers()


def _numbers(loader) -> list[list[int | None]]:
    return [[step.number, *(s.number for s in step.upcoming)] for step in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_bring_the_steps_that_come_next(store, sampler, workers):
    """Over the end of an epoch (3 steps) and of the data, from any step, and without changing any batch."""
    whole = list(train_loader(store, sampler, LAYOUT, total_steps=7))
    ahead = train_loader(store, sampler, LAYOUT, total_steps=7, start_step=2, num_workers=workers, lookahead=3)
    assert len(ahead) == 7
    assert _numbers(ahead) == [[2, 3, 4], [3], [4], [5, 6], [6]]
    assert _numbers(ahead) == [[0, 1, 2], [1], [2], [3, 4, 5], [4], [5], [6]]
    steps = list(ahead)
    assert [contents(step) for step in steps] == [contents(step) for step in whole]
    assert [contents(s) for step in steps for s in step.upcoming] == [contents(whole[n]) for n in (1, 2, 4, 5)]
    if workers:
        ahead._iterator._shutdown_workers()


def test_validation_batches_have_no_number_and_look_at_nothing(store, sampler):
    assert _numbers(validation_loader(store, sampler, LAYOUT)) == [[None]] * 3


ORPHANS = """
    import sys, time
    from data_kit import make_store, random_rows
    from pathlib import Path
    from nemo_kto.data.collate import BatchLayout
    from nemo_kto.data.datamodule import train_loader
    from nemo_kto.data.sampler import GlobalBatchSampler
    if __name__ == "__main__":
        store = make_store(Path(sys.argv[1]), random_rows(27))
        layout = BatchLayout(0, 1, 2, 0, 32, 1, True)
        sampler = GlobalBatchSampler(27, 8, seed=3, shuffle=True)
        loader = train_loader(store, sampler, layout, total_steps=9, num_workers=2)
        steps = iter(loader)
        next(steps)
        print(*[worker.pid for worker in loader._iterator._workers], flush=True)
        time.sleep(600)
"""


def test_workers_die_with_a_killed_training(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(ORPHANS))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(script), str(tmp_path / "store")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        workers = [Path("/proc", pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        assert all(worker.exists() for worker in workers)
        training.kill()
    deadline = time.monotonic() + 30
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.05)


def test_validation_loader(store):
    validation = GlobalBatchSampler(27, 8, seed=3, shuffle=False, drop_last=False)
    loader = validation_loader(store, validation, replace(LAYOUT, dp_rank=0, dp_size=1))
    for _ in range(2):
        steps = list(loader)
        assert [step.counts.num_samples for step in steps] == [8, 8, 8, 3]
        rows = [sorted(i for batch in step for i in batch.index.tolist()) for step in steps]
        assert [i for found in rows for i in found] == list(range(27))
    assert len(loader) == 4


def test_steps_travel_by_value(store, sampler):
    step = StepDataset(store, sampler, replace(LAYOUT, micro_batch_size=1))[0]
    open_before = len(os.listdir("/proc/self/fd"))
    copy = ForkingPickler.loads(ForkingPickler.dumps(step))
    assert len(os.listdir("/proc/self/fd")) == open_before, "no file descriptor per tensor"
    assert isinstance(copy, LoadedStep)
    assert contents(copy) == contents(step)
    copy.micro_batches[0].samples.tokens.zero_()  # writable, like any tensor


def test_moving_and_pinning_keep_the_content(store, sampler, monkeypatch):
    step = StepDataset(store, sampler, LAYOUT)[0]
    assert contents(step.to(torch.device("cpu"))) == contents(step)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pinned = step.pin_memory()
    assert contents(pinned) == contents(step)
    assert pinned.micro_batches[0].samples.tokens is not step.micro_batches[0].samples.tokens


def test_loaders_leave_the_random_state_alone(store, sampler):
    before = torch.get_rng_state()
    list(train_loader(store, sampler, LAYOUT, total_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dp_rank", "needs_kl", "times"), [(0, True, 1), (1, True, 0), (0, False, 0)])
def test_lonely_samples_are_mentioned_once(tmp_path, caplog, dp_rank, needs_kl, times):
    store = make_store(tmp_path / "s", random_rows(8, prompts=1))
    layout = replace(LAYOUT, dp_rank=dp_rank, needs_kl=needs_kl)
    loader = StepLoader(
        StepDataset(store, GlobalBatchSampler(8, 4, seed=0, shuffle=True), layout), StepSampler(4), num_workers=0
    )
    with caplog.at_level(logging.WARNING):
        list(loader)
        list(loader)
    assert caplog.text.count("4 of 4 samples of a global batch have no partner") == times


@pytest.mark.parametrize(
    ("counts", "weights", "normalization", "expected"),
    [
        ((10, 0), (1, 1), "per_class", "no undesirable row"),
        ((0, 10), (1, 1), "per_batch", "no desirable row"),
        ((10, 10), (1, 1), "per_batch", None),
        ((40, 30), (1, 1), "per_batch", None),
        ((10, 90), (1, 1), "per_class", None),
        ((10, 90), (1, 1), "per_batch", "set model.kto.desirable_loss_weight between 9 and 12"),
        ((10, 90), (9, 1), "per_batch", None),
        ((10, 90), (9, 1), "per_class", "set model.kto.undesirable_loss_weight between 6.75 and 9"),
        ((80, 20), (1, 2), "per_batch", "set model.kto.undesirable_loss_weight between 3 and 4"),
        ((80, 20), (1, 0), "per_batch", None),
    ],
)
def test_class_balance(counts, weights, normalization, expected):
    warning = class_balance_warning(*counts, *weights, normalization)
    assert (warning is None) == (expected is None)
    assert expected is None or expected in warning


def test_imbalance_is_logged(tmp_path, caplog):
    rows = [(p, r, i < 2) for i, (p, r, _) in enumerate(random_rows(20))]
    summary = make_store(tmp_path / "s", rows).summary
    kto = KTOConfig(
        1, 0.1, 1.0, 1.0, False, False, 1.0, 0.0, "swap", "", 1, "auto", "", False, "per_sample", "per_class", "kto"
    )
    with caplog.at_level(logging.WARNING):
        warn_of_imbalance(summary, kto)
        assert caplog.text == ""
        warn_of_imbalance(summary, replace(kto, loss_type="apo_zero_unpaired"))
        warn_of_imbalance(summary, replace(kto, loss_normalization="per_batch"))
    assert caplog.text.count("desirable_loss_weight between 9 and 12") == 2
