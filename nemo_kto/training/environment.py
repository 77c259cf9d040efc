"""Tells Lightning which processes there are. Starts nothing."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment

from nemo_kto.config.world import World, meeting_point


class LaunchedEnvironment(ClusterEnvironment):
    """Lightning's view of a job: what :class:`World` read, and nothing guessed anew.

    Lightning's own detection refuses plain ``srun -n``, takes a Slurm job named "interactive" for one process, and
    looks at Slurm's variables in a batch script as well, where one process runs.

    Args:
        world: this process among all of the job.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """All processes of the job are there: Lightning is to start none."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 listens."""
        return meeting_point()[0]

    @property
    def main_port(self) -> int:
        """The port rank 0 listens on."""
        return meeting_point()[1]

    @staticmethod
    def detect() -> bool:
        """Never by itself: it is given."""
        return False

    def world_size(self) -> int:
        """Processes of the job."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """The launcher has settled it."""

    def global_rank(self) -> int:
        """This process among all of them."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has settled it."""

    def local_rank(self) -> int:
        """This process among those of its node."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """This node among the job's."""
        return self._world.node_rank
