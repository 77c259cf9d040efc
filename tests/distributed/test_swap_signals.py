"""Signals that arrive while the reference is swapped in wait until the policy is back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from toy_network import toy

pytestmark = pytest.mark.distributed

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _toy():
    """A swap over one small layer, whose weights a forked child shares with this process, and a copy of the policy."""
    from nemo_kto.reference.host_weights import HostWeights
    from nemo_kto.reference.swap import WeightSwap

    layer = torch.nn.Linear(4, 4).share_memory()
    network = toy(layer)
    swap = WeightSwap([network], HostWeights([network]))
    with torch.no_grad():
        layer.weight.add_(1.0)
    return swap, layer.weight, layer.weight.detach().clone()


def _handled(number: signal.Signals) -> dict[str, object]:
    """Signal this process inside the block, twice, with a handler of its own installed."""
    swap, weight, policy = _toy()
    seen: list[tuple[int, bool, bool]] = []

    def handler(received: int, _frame: object) -> None:
        seen.append((received, swap.active, torch.equal(weight, policy)))

    before = signal.signal(number, handler)
    with swap.swapped():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        during = list(seen)
    restored = signal.getsignal(number) is handler
    signal.signal(number, before)
    return {"during": during, "after": seen, "number": int(number), "handler restored": restored}


def _fatal(folder: Path, number: signal.Signals) -> dict[str, object]:
    """The same with the default action, in a child, since it dies of it."""
    swap, weight, policy = _toy()
    marker = folder / f"scored-{number.name}"
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)
        with swap.swapped():
            os.kill(os.getpid(), number)
            marker.touch()
        os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    return {
        "died of it": os.WIFSIGNALED(status) and os.WTERMSIG(status) == number,
        "scored first": marker.exists(),
        "policy back": torch.equal(weight, policy),
    }


def _interrupted() -> dict[str, object]:
    """Ctrl-C raises KeyboardInterrupt: out of the block, not in the middle of it."""
    swap, weight, policy = _toy()
    reached = False
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    try:
        with swap.swapped():
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
    except KeyboardInterrupt:
        return {"reached": reached, "policy back": torch.equal(weight, policy), "active": swap.active}
    return {}


def _raising() -> dict[str, object]:
    """A signal and an error: the error goes on, and the signal is not lost."""
    swap, weight, policy = _toy()
    seen: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(torch.equal(weight, policy)))
    try:
        with swap.swapped():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError
    except ZeroDivisionError:
        return {"seen": seen}
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_a_thread() -> dict[str, object]:
    """Handlers belong to the main thread; elsewhere the swap works without them."""
    swap, weight, policy = _toy()
    found: list[bool] = []

    def work() -> None:
        with swap.swapped():
            found.append(not torch.equal(weight, policy))
        found.append(torch.equal(weight, policy))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return {"found": found}


def _foreign() -> dict[str, object]:
    """A handler that C code installed is one that Python can neither see nor put back: it must stay."""
    swap, _, _ = _toy()
    real, asked = signal.getsignal, []

    def getsignal(number: int) -> object:
        asked.append(number)
        return None if number == signal.SIGUSR1 else real(number)

    signal.getsignal = getsignal
    before = real(signal.SIGUSR1)
    try:
        with swap.swapped():
            kept = real(signal.SIGUSR1) is before
    finally:
        signal.getsignal = real
    return {"kept": kept}


def _all(rank: int, folder: Path) -> dict[str, object]:
    return {
        **{f"handled {n.name}": _handled(n) for n in HELD},
        **{f"fatal {n.name}": _fatal(folder, n) for n in (signal.SIGTERM, signal.SIGUSR1)},
        "interrupted": _interrupted(),
        "raising": _raising(),
        "thread": _in_a_thread(),
        "foreign": _foreign(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(1, _all, tmp_path_factory.mktemp("signals"))[0]


@pytest.mark.parametrize("number", HELD)
def test_a_handler_runs_only_when_the_policy_is_back(number, found):
    case = found[f"handled {number.name}"]
    assert case["during"] == []
    assert case["after"] == [(number, False, True)] * 2
    assert case["handler restored"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_default_action_waits_too(number, found):
    assert found[f"fatal {number.name}"] == {"died of it": True, "scored first": True, "policy back": True}


def test_an_interrupt_leaves_the_block_first(found):
    assert found["interrupted"] == {"reached": True, "policy back": True, "active": False}


def test_a_signal_is_not_lost_when_scoring_raises(found):
    assert found["raising"] == {"seen": [True]}


def test_swapping_outside_the_main_thread(found):
    assert found["thread"] == {"found": [True, True]}


def test_a_handler_of_c_code_is_left_alone(found):
    assert found["foreign"] == {"kept": True}
