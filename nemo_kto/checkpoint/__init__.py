"""Weights and training state on disk: Hugging Face directories and Megatron distributed checkpoints."""
