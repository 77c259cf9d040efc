"""Paths and tiny assets that every test room shares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "tests")]

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny untied Llama with tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "llama")
