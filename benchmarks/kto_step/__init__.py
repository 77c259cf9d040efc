"""One KTO step side by side: TRL, NeMo-Aligner's algorithm, and this project. Run by ``make bench``."""
