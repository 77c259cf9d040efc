"""The network: Megatron's GPT built from an architecture, and its passes through the pipeline schedule."""
