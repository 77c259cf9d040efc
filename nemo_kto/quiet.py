"""Silences the stack's start-up noise at its source, so that what a user sees is ours. Call before heavy imports."""

from __future__ import annotations

import logging
import os
import warnings

_TELEMETRY = (
    "nv_one_logger",
    "nv_one_logger.api.config",  # warns that telemetry has no exporter: nothing is collected, which is what we want
    "nv_one_logger.recorder.default_recorder",  # reports the end of a stopped run as an error
    "nv_one_logger.training_telemetry.api.training_telemetry_provider",
)
_NOISY_LOGGERS = (
    "megatron",
    "megatron.core",
    "torch.distributed",
    "torch.distributed.elastic",
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "transformers",
    "matplotlib",
)


def quiet() -> None:
    """Drop library warnings and informational logs. Errors still come through.

    Environment variables are set only where the user left them unset.
    """
    warnings.filterwarnings("ignore")
    _raise_levels()
    for key, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a peer that has gone is reported as an error, not with a stack of C++
        "KINETO_LOG_LEVEL": "99",  # the profiler would tell of every stage that it reaches
        "PYTHONWARNINGS": "ignore",  # for the worker processes
    }.items():
        os.environ.setdefault(key, value)


def quiet_nemo() -> None:
    """Lower NeMo's own logger to errors; it exists only once NeMo is imported.

    Importing NeMo imports Lightning, which sets the levels of its loggers anew: they are lowered again.
    """
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    _raise_levels()


def _raise_levels() -> None:
    for name in _NOISY_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_only_errors)
    for name in _TELEMETRY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL)
        logger.addFilter(_nothing)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _nothing(_: logging.LogRecord) -> bool:
    return False
