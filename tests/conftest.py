"""Paths and tiny assets that every test room shares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "tests")]

import tiny  # noqa: E402


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> Callable[[str], set[str]]:
    """Values of a parameter in the tests of a module that are going to run, so that a fixture makes these alone."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return lambda parameter: {call.params[parameter] for call in calls if call and parameter in call.params}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny untied Llama with tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "llama")
