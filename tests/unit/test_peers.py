"""Which errors mean that another rank has gone, and which are our own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_kto.errors import CheckpointError
from nemo_kto.peers import is_loss, lost_contact

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
LOST = [
    RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:54321"),
    RuntimeError(GLOO + "Connection reset by peer [10.0.0.7]:1. This may indicate a peer's failure.\nframe #0"),
    RuntimeError(GLOO + "Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by ..."),
    RuntimeError("[/gloo/transport/tcp/buffer.cc:72] Timed out waiting 1800000ms for recv operation to complete"),
    torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL 2.27\n"
        "ncclRemoteError: A call failed possibly due to a network error"
    ),
    torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /0//cpu//0"),
]
OURS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("Connection closed by peer"),  # nobody of torch's says this
    RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
    torch.distributed.DistBackendError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)"),
    CheckpointError("nccl: Connection closed by peer"),
    ConnectionResetError("Connection reset by peer"),  # W&B's server, say
    ValueError("gloo/ Connection closed by peer"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_peer_has_gone(error):
    assert is_loss(error)
    said = str(lost_contact(error))
    assert said.startswith("lost contact with another rank (")
    assert "\n" not in said
    assert "frame" not in said
    assert "This" not in said


@pytest.mark.parametrize("error", OURS, ids=str)
def test_an_error_of_our_own_is_not_taken_for_that(error):
    assert not is_loss(error)


def test_the_reason_is_said_without_the_place_in_torch():
    assert "rank (Connection reset by peer [10.0.0.7]:1): its own log says why" in str(lost_contact(LOST[1]))


LEAVES = """\
import sys, time
import torch.distributed as dist
from nemo_kto import peers
server = dist.TCPStore("localhost", 0, 1, is_master=True)
peers._LOOK_S = 0  # all the time, so that the end finds the thread within the store
peers.watch(dist.TCPStore("localhost", server.port, 1, is_master=False), rank=0)
time.sleep(0.2)
sys.exit(4)
"""


def test_a_rank_that_ends_while_it_looks_keeps_its_exit_code():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (4, "")
