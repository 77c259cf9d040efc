"""The NeMo model, its Lightning strategy, optimizer, metrics and trainer."""
