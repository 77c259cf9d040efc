"""In a process of its own: imports modules one by one, and says what came of each. Whatever they do ends here."""

from __future__ import annotations

import importlib
import sys
import time

from nemo_kto.doctor.children import reason, voice

_INSPECTION = "inspection"


def main(modules: list[str]) -> None:
    """Say ``begins`` and then ``version`` or ``error`` of each; then, as they are imported, what they would do."""
    from nemo_kto.doctor import inspecting
    from nemo_kto.quiet import quiet

    say = voice()
    quiet()
    for name in modules:
        say(module=name, begins=True)
        began = time.monotonic()
        try:
            _prepare(name)
            module = importlib.import_module(name)
        except BaseException as error:  # a package may raise anything on import, SystemExit included
            say(module=name, error=reason(error))
            continue
        version = getattr(module, "__version__", None)
        say(module=name, version=None if version is None else str(version), seconds=time.monotonic() - began)
    say(module=_INSPECTION, begins=True)
    inspecting.answer(say, inspecting.TOPICS)


def _prepare(name: str) -> None:
    if name.startswith("megatron."):
        from nemo_kto import cpu_backend

        cpu_backend.install()  # without it megatron.core does not import where there is no CUDA


if __name__ == "__main__":
    main(sys.argv[1:])
