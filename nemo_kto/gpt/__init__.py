"""Floor 3: the network, from config to Megatron modules, and its forward pass.

Importing any room of it prepares a machine without CUDA first, because Megatron must not be imported before that.
"""

from nemo_kto.cpu_backend import install

install()
