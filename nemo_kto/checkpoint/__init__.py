"""Weights and training state on disk: Hugging Face directories and Megatron distributed checkpoints.

Importing any room of it prepares a machine without CUDA first, because Megatron must not be imported before that.
"""

from nemo_kto.cpu_backend import install

install()
