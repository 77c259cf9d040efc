"""What is to be sized: the run, the machine it is for, and one way of laying it out. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_kto.config.architecture import Architecture
from nemo_kto.config.checks import check_length
from nemo_kto.config.layout import padded_vocab_size
from nemo_kto.data.plan import micro_batches_of_pipeline
from nemo_kto.errors import ConfigError

GB = 10**9
"""Bytes of a GB, everywhere here. A GPU sold with 80 GB has some 85 x 10^9; the rest is left to CUDA and NCCL."""


@dataclass(frozen=True)
class Machine:
    """A GPU, and what connects it. Speeds are what a run sustains, not what a data sheet says.

    Attributes:
        memory: bytes of a GPU.
        reserve: part of the memory that is left free, for what is not predicted: CUDA's context, NCCL's buffers, holes
            in the allocator's blocks.
        flops: matrix operations per second in the run's precision.
        memory_speed: bytes per second of the GPU's own memory.
        nvlink: bytes per second and direction of a GPU to others of its node.
        network: bytes per second and direction of a GPU to other nodes.
        host_link: bytes per second between pinned host memory and a GPU.
        launch: seconds that a layer's forward takes at least, for its kernels are launched one by one.
        latency: seconds that an exchange takes at least.
    """

    memory: int = 80 * GB
    reserve: float = 0.1
    flops: float = 400e12
    memory_speed: float = 2.5e12
    nvlink: float = 300e9
    network: float = 40e9
    host_link: float = 40e9
    launch: float = 1e-4
    latency: float = 2e-5

    @property
    def usable(self) -> int:
        """Bytes that may be planned with."""
        return int(self.memory * (1 - self.reserve))


@dataclass(frozen=True)
class Job:
    """A run, whatever its layout.

    Attributes:
        arch: the network.
        world: number of GPUs.
        gpus_per_node: GPUs of a node.
        seq_length: longest row, tokens (``model.data.seq_length``).
        global_batch_size: samples per optimizer step.
        bf16: bfloat16 weights; otherwise float32.
        optimizer: ``distributed_fused_adam`` or ``adamw``.
        lora_dim: rank of adapters on all linear layers; None trains all weights.
        mean_length: mean row, tokens; affects time alone, as memory is that of full micro-batches.
    """

    arch: Architecture
    world: int
    gpus_per_node: int
    seq_length: int
    global_batch_size: int
    bf16: bool = True
    optimizer: str = "distributed_fused_adam"
    lora_dim: int | None = None
    mean_length: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a mean row."""
        return self.seq_length if self.mean_length is None else self.mean_length

    def check(self) -> None:
        """Refuse what no layout could mend.

        Raises:
            ConfigError: names the option.
        """
        if self.seq_length < 2:
            raise ConfigError(
                f"--seq-length {self.seq_length} leaves no room for a prompt and a response: give 2 or more"
            )
        check_length(self.arch, self.seq_length)
        if self.world > self.gpus_per_node and self.world % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {self.world} is not a multiple of --gpus-per-node {self.gpus_per_node}: give whole nodes"
            )
        if self.global_batch_size < 2:
            raise ConfigError(f"--global-batch-size {self.global_batch_size}: KTO pairs samples, give at least 2")
        if not 1 <= self.tokens_per_row <= self.seq_length:
            raise ConfigError(f"--mean-length {self.mean_length} must be in [1, --seq-length {self.seq_length}]")


@dataclass(frozen=True)
class Layout:
    """One way of laying a run out.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline stages.
        dp: data-parallel size.
        sequence_parallel: whether norms' activations are sharded along the sequence.
        micro_batch_size: rows of ``seq_length`` tokens that a forward takes.
        recompute: None, ``block`` (the first ``recompute_layers`` layers of a stage, one by one) or ``uniform`` (all
            layers, ``recompute_layers`` at a time).
        recompute_layers: ``model.activations_checkpoint_num_layers``; 0 without.
    """

    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    micro_batch_size: int
    recompute: str | None = None
    recompute_layers: int = 0

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the activations between tensor-parallel regions."""
        return self.tp if self.sequence_parallel else 1

    def vocabulary_columns(self, arch: Architecture) -> int:
        """Columns of the LM head on a rank."""
        return padded_vocab_size(arch.vocab_size, self.tp) // self.tp

    def micro_batches(self, job: Job) -> int:
        """Micro-batches of a data-parallel rank in a step, as packing makes them of rows of mean length.

        See :func:`nemo_kto.data.plan.packed`: as few as hold all rows, but more where a pipeline wants them.
        """
        rows = job.global_batch_size // self.dp
        tokens = rows * job.tokens_per_row
        rows_of_one = max(1, self.micro_batch_size * job.seq_length // job.tokens_per_row)
        fewest = -(-rows // rows_of_one)
        return min(rows, max(fewest, micro_batches_of_pipeline(tokens, self.pp)))
