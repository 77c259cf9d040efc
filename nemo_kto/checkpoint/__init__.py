"""Weights and training state on disk: Hugging Face directories and Megatron distributed checkpoints.

Importing any room of it prepares a machine without CUDA first, because Megatron must not be imported before that.
"""

import os

from nemo_kto.cpu_backend import install

install()
# it would make torch.load unpickle whatever a file holds, also where weights_only is asked for
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
