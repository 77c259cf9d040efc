"""Say whether this machine can train, and what would make it so.

Looks at packages, devices, limits, network, launcher and output directory. With --collective also exchanges data
between two processes, or, under torchrun or srun, between all ranks of the job. Exit code 0: nothing stands in the way
of training; 2: something does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kto import __version__
from nemo_kto.config.world import BY_HAND, World, world_from_environment
from nemo_kto.errors import ConfigError

if TYPE_CHECKING:
    from nemo_kto.doctor.findings import Finding

EXAMPLE = """\
examples:
  nemo-kto doctor
  nemo-kto doctor --collective --output results
  srun --ntasks-per-node=8 nemo-kto doctor --collective     # a check of all nodes of the job
  nemo-kto doctor --json > doctor.json
"""
_DEFAULT_OUTPUT = Path("kto_results")
_COMPARED = ("nemo_kto", "torch", "megatron-core", "nemo_toolkit", "transformer_engine", "lightning")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at besides, and how to say it."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"where a run would write (default: {_DEFAULT_OUTPUT}, as exp_manager.explicit_log_dir)",
    )
    parser.add_argument("--collective", action="store_true", help="exchange data between processes")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="of --collective, for each stage (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Look at everything; rank 0 speaks for all."""
    from nemo_kto.doctor import findings

    if not (math.isfinite(args.timeout) and args.timeout > 0):
        raise ConfigError(f"--timeout {args.timeout} must be a number of seconds above 0")
    try:
        world = world_from_environment()
    except ConfigError:  # told by the launcher's probe
        world = World(0, 1, 1, launched=False)
        args.collective = False
    if world.rank != 0:
        return _as_another_rank(args, world) if args.collective else _silent(world)
    found = _look(args, world)
    if args.json:
        print(json.dumps(findings.as_json(found, __version__), indent=2))
    else:
        print(findings.as_text(found, __version__))
    return findings.exit_code(found)


def _look(args: argparse.Namespace, world: World) -> list[Finding]:
    from nemo_kto.doctor import collective, launching, limits, machine, output, packages

    own = limits.probe(world.size)
    exchange = []
    if args.collective and world.size > 1:  # first: the other ranks look at nothing else, and wait for this one
        exchange.append(collective.probe(world, machine.count_gpus(), args.timeout, _about(own)))
    imported, topics = packages.probe()
    devices = machine.devices(topics["torch"], topics["devices"])
    acceleration = machine.acceleration(topics["megatron"], topics["network"])
    found = [launching.probe(), imported, devices, acceleration, launching.interfaces(), own]
    found.append(output.probe(args.output or _DEFAULT_OUTPUT, asked=args.output is not None))
    found += exchange
    if args.collective and world.size == 1:
        found.append(collective.probe(world, len(devices.facts["gpus"]), args.timeout, _about(own)))
    return found


def _silent(world: World) -> int:
    if world.launcher == BY_HAND:
        print(
            f"this is rank {world.rank} of {world.size} ({BY_HAND}), and rank 0 speaks for all: if nothing has "
            "started this rank, unset RANK and WORLD_SIZE",
            file=sys.stderr,
        )
    return 0


def _as_another_rank(args: argparse.Namespace, world: World) -> int:
    """Take part, and report to rank 0 through the exchange itself; speak only where that has failed."""
    from nemo_kto.doctor import collective, findings, limits, machine

    found = collective.probe(world, machine.count_gpus(), args.timeout, _about(limits.probe(world.size)))
    if not found.facts["ok"]:
        raise ConfigError(f"doctor: {'; '.join(problem.what for problem in found.problems)}")
    return findings.exit_code([found])


def _about(own: Finding) -> dict[str, Any]:
    """What rank 0 is to know of this rank's node."""
    import platform

    from nemo_kto.doctor.packages import installed_version

    versions = {name: installed_version(name) for name in _COMPARED} | {"python": platform.python_version()}
    return {"versions": versions, "problems": [asdict(problem) for problem in own.problems]}
