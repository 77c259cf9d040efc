"""Starts, or is, the ranks of the collective self-test, and tells what came of it. Imports no torch itself."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack
from typing import Any

from nemo_kto.config.world import LISTEN_FD, World
from nemo_kto.doctor.children import Child
from nemo_kto.doctor.findings import Finding

_RANK = "nemo_kto.doctor.collective_rank"
_IMPORT_S = 240.0
"""Importing torch from a cold network file system."""
_SLACK_S = 15.0
"""Beyond the patience of the ranks themselves, before one is taken to hang."""
_OWN = 2


def probe(world: World, gpus: int, patience_s: float, about: dict[str, Any]) -> Finding:
    """Exchange between all ranks of the job, or between two processes of this machine where there is no launcher.

    Args:
        world: this process among all of the job.
        gpus: that torch sees here. With fewer than two, two processes of one machine cannot use NCCL.
        patience_s: how long a rank waits for another, in seconds.
        about: JSON values that rank 0 learns of this rank: its ``versions`` and ``problems``.
    """
    finding = Finding("collective", "collective self-test")
    if world.size > 1:
        backend = "nccl" if gpus else "gloo"
        with Child(_RANK, backend, str(patience_s), json.dumps(about), as_rank=True) as child:
            outcomes = {world.rank: _follow(child, patience_s)}
        _judge(finding, outcomes, backend, world.size, world)
        return finding
    backend = "nccl" if gpus >= _OWN else "gloo"
    outcomes = _own_ranks(_OWN, backend, patience_s, about)
    _judge(finding, outcomes, backend, _OWN, world)
    if gpus == 1:
        finding.lines.append("one GPU: NCCL takes one per rank, so the two processes talked over gloo")
        alone = Finding("collective", "")
        _judge(alone, _own_ranks(1, "nccl", patience_s, about), "nccl", 1, world)
        finding.facts["nccl_alone"] = alone.facts
        finding.lines += [f"NCCL, one rank: {line}" for line in alone.lines]
        finding.problems += alone.problems
    return finding


def _own_ranks(size: int, backend: str, patience_s: float, about: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What came of each of ``size`` processes of this machine."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(size + 8)
        port = str(listener.getsockname()[1])
        children = []
        for rank in range(size):
            own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            own.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
            fds: tuple[int, ...] = ()
            if rank == 0 and size > 1:
                fds, own[LISTEN_FD] = (listener.fileno(),), str(listener.fileno())
            words = (backend, str(patience_s), json.dumps(about))
            children.append(stack.enter_context(Child(_RANK, *words, environment=own, pass_fds=fds)))
        return {rank: _follow(child, patience_s) for rank, child in enumerate(children)}


def _follow(child: Child, patience_s: float) -> dict[str, Any]:
    """Read a rank until it ends, or stays in one stage for too long."""
    outcome: dict[str, Any] = {"stage": "starting", "measured": [], "reports": [], "error": None, "done": False}
    began = time.monotonic()
    while True:
        allowed = _SLACK_S + (_IMPORT_S if outcome["stage"] in ("starting", "importing torch") else patience_s)
        answer = child.answer(allowed)
        if answer is None:
            break
        if "measured" in answer:
            outcome["measured"].append(answer)
        elif "reports" in answer:
            outcome["reports"] = answer["reports"]
        else:
            outcome |= answer
    how = child.end()
    if not outcome["done"] and outcome["error"] is None:
        outcome["error"] = how or "its process ended early"
    outcome["seconds"] = time.monotonic() - began
    return outcome


def _judge(finding: Finding, outcomes: dict[int, dict[str, Any]], backend: str, size: int, world: World) -> None:
    first = outcomes[min(outcomes)]
    finding.facts = {
        "backend": backend,
        "ranks": size,
        "ok": all(outcome["done"] for outcome in outcomes.values()),
        "measured": [{key: value for key, value in one.items()} for one in first["measured"]],
        "reports": first["reports"],
        "errors": {str(rank): outcome["error"] for rank, outcome in outcomes.items() if outcome["error"]},
    }
    where = "processes of this machine" if world.size == 1 else f"ranks on {world.num_nodes} node(s)"
    finding.lines.append(f"{size} {where} over {backend}")
    for one in first["measured"]:
        finding.lines.append(
            f"{one['measured']}: {one['latency_s'] * 1e6:.0f} us for 4 bytes, {one['seconds'] * 1e3:.1f} ms for "
            f"{one['bytes'] / 2**20:.0f} MiB ({one['bytes_per_second'] / 1e9:.2f} GB/s)"
        )
        if one["wrong"]:
            finding.wrong(
                f"{one['measured']} gave wrong numbers over {backend}",
                "training would be silently wrong",
                "NCCL: try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1 in turn to find the faulty path, and have it mended",
                blocks=True,
            )
    _judge_errors(finding, outcomes, backend)
    _judge_reports(finding, first["reports"])


def _judge_errors(finding: Finding, outcomes: dict[int, dict[str, Any]], backend: str) -> None:
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome["error"] is not None}
    # a rank that only lost another says less than the one that was lost
    for rank, outcome in sorted(failed.items(), key=lambda item: "lost contact" in item[1]["error"]):
        stage = outcome["stage"]
        finding.lines.append(f"rank {rank} failed while {_doing(stage)}: {outcome['error']}")
    if failed:
        rank, outcome = min(failed.items(), key=lambda item: "lost contact" in item[1]["error"])
        finding.wrong(
            f"rank {rank} failed while {_doing(outcome['stage'])}: {outcome['error']}",
            "a training over several processes would fail there, or wait there for its timeout",
            _fix(outcome["stage"], backend),
            blocks=True,
        )


def _doing(stage: str) -> str:
    return stage if " " in stage or stage.endswith("ing") else f"in {stage}"


def _fix(stage: str, backend: str) -> str:
    if stage in ("starting", "importing torch"):
        return "see packages"
    if stage == "joining":
        return (
            "start as many processes as the launcher says, and see that every node reaches MASTER_ADDR and "
            "MASTER_PORT (firewall; the address must be rank 0's own on the cluster's network)"
        )
    if "gloo" in stage or backend == "gloo":
        return "export GLOO_SOCKET_IFNAME=INTERFACE, the one that leads to the other nodes (see network), on all ranks"
    return (
        "export NCCL_DEBUG=INFO and read what NCCL says; usual causes: NCCL_SOCKET_IFNAME names no common network, "
        "/dev/shm is too small, ranks share a GPU, or InfiniBand needs NCCL_IB_HCA"
    )


def _judge_reports(finding: Finding, reports: list[dict[str, Any]]) -> None:
    """Compare what ranks said of their nodes."""
    hosts = sorted({report["host"] for report in reports})
    versions: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        for name, version in report["versions"].items():
            versions.setdefault(name, {}).setdefault(str(version), []).append(report["host"])
    for name, found in versions.items():
        if len(found) > 1:
            told = "; ".join(f"{version} on {', '.join(sorted(set(on))[:4])}" for version, on in found.items())
            finding.wrong(
                f"{name} differs between hosts: {told}",
                "ranks of one job must run the same code; otherwise they hang, or disagree silently",
                "start all nodes from one container image or one environment",
                blocks=True,
            )
    if len(hosts) > 1:
        finding.lines.append(f"hosts: {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''}")
    for report in reports:
        if report["rank"] != 0 and report["host"] != reports[0]["host"]:
            for problem in report["problems"]:
                finding.wrong(
                    f"on {report['host']}: {problem['what']}", problem["why"], problem["fix"], blocks=problem["blocks"]
                )
