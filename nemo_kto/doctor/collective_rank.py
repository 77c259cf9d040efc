"""One rank of the collective self-test, in a process of its own: a rank that hangs or aborts is seen from outside.

Every stage is announced before it begins, so that whoever watches knows where it stuck.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from nemo_kto import parents
from nemo_kto.doctor.children import reason, voice

_LARGE = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
"""Bytes of a large exchange, by backend."""
_SMALL = 4
_REPEATS = {"gloo": 3, "nccl": 10}


def main(backend: str, patience_s: str, about: str) -> None:
    """Join, exchange, compare, and say what was found.

    Args:
        backend: ``gloo`` or ``nccl``.
        patience_s: seconds to wait for another rank, in any stage.
        about: JSON of what rank 0 is to know of this rank.
    """
    say = voice()
    parents.follow_parent()
    test = _Test(say, backend, float(patience_s), json.loads(about))
    try:
        test.run()
    except BaseException as error:  # torch raises everything, from RuntimeError to SystemExit
        say(error=reason(error), stage=test.stage, seconds=time.monotonic() - test.began)
        test.tell(error)
        raise SystemExit(1) from None


class _Test:
    """The test, and the stage that it has reached."""

    def __init__(self, say: voice, backend: str, patience_s: float, about: dict[str, Any]) -> None:
        self.stage, self.began = "importing torch", time.monotonic()
        self._say, self._backend, self._about = say, backend, about
        self._patience = timedelta(seconds=patience_s)

    def run(self) -> None:
        """All stages."""
        self._enter("importing torch")
        from nemo_kto.quiet import quiet

        quiet()
        import torch
        import torch.distributed as dist

        from nemo_kto.config.world import world_from_environment
        from nemo_kto.distributed.join import Timeouts, join

        self._world = world_from_environment()
        device = torch.device("cpu")
        if self._backend == "nccl":
            device = torch.device("cuda", self._world.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        self._device = device
        self._enter("joining")
        join(self._world, self._backend, Timeouts(self._patience, self._patience, "--timeout"))
        self._say(joined=True, rank=dist.get_rank(), size=dist.get_world_size())
        self._enter("forming a gloo group")
        gloo = dist.new_group(backend="gloo", timeout=self._patience)
        self._enter("gathering reports over gloo")
        self._gather(gloo)
        for name in ("all_reduce", "broadcast", "send_recv"):
            self._measure(name, gloo)
        self._enter("leaving")
        from nemo_kto.launch import shutdown

        shutdown()
        self._say(done=True)

    def tell(self, error: BaseException) -> None:
        """Let the others know at once, where they can be reached."""
        with suppress(Exception):
            from nemo_kto.peers import tell_others

            tell_others(f"{self.stage}: {reason(error)}")

    def _enter(self, stage: str) -> None:
        self.stage, self.began = stage, time.monotonic()
        self._say(stage=stage)

    def _gather(self, gloo: Any) -> None:
        import torch.distributed as dist

        own = {**self._about, "rank": dist.get_rank(), "host": socket.gethostname()}
        reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, reports, dst=0, group=gloo)
        if reports is not None:
            self._say(reports=reports)

    def _measure(self, name: str, gloo: Any) -> None:
        """Time a small and a large exchange; the slowest rank counts."""
        import torch
        import torch.distributed as dist

        self._enter(name)
        exchange: Callable[[Any], float] = {
            "all_reduce": _all_reduce,
            "broadcast": _broadcast,
            "send_recv": _send_recv,
        }[name]
        seconds, wrong = [], 0.0
        for size, repeats in ((_SMALL, 10), (_LARGE[self._backend], _REPEATS[self._backend])):
            tensor = torch.empty(size // 4, device=self._device)
            wrong += exchange(tensor)  # the first also connects
            self._finish(gloo)
            began = time.monotonic()
            for _ in range(repeats):
                wrong += exchange(tensor)
            self._finish(None)
            seconds.append((time.monotonic() - began) / repeats)
        worst = torch.tensor([*seconds, wrong], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=gloo)
        small, large, wrong = worst.tolist()
        size = _LARGE[self._backend]
        self._say(
            measured=name, latency_s=small, seconds=large, bytes=size, bytes_per_second=size / large, wrong=wrong > 0
        )

    def _finish(self, group: Any) -> None:
        import torch
        import torch.distributed as dist

        if self._device.type == "cuda":
            torch.cuda.synchronize()
        if group is not None:
            dist.barrier(group)


def _all_reduce(tensor: Any) -> float:
    """Sum of rank + 1 over all ranks; how far it is off."""
    import torch.distributed as dist

    size = dist.get_world_size()
    tensor.fill_(dist.get_rank() + 1)
    dist.all_reduce(tensor)
    return abs(float((tensor - size * (size + 1) / 2).abs().max()))


def _broadcast(tensor: Any) -> float:
    """The last rank's number, everywhere; how far it is off."""
    import torch.distributed as dist

    last = dist.get_world_size() - 1
    tensor.fill_(dist.get_rank() + 1)
    dist.broadcast(tensor, src=last)
    return abs(float((tensor - (last + 1)).abs().max()))


def _send_recv(tensor: Any) -> float:
    """Each rank's number to the next one, around; how far it is off."""
    import torch
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return 0.0
    tensor.fill_(rank + 1)
    received = torch.empty_like(tensor)
    before, after = (rank - 1) % size, (rank + 1) % size
    work = [dist.P2POp(dist.isend, tensor, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return abs(float((received - (before + 1)).abs().max()))


if __name__ == "__main__":
    main(*sys.argv[1:])
