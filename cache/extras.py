"""Optional parts of the package, by the modules that they install."""

from __future__ import annotations

_TRAINER = 'pip install "potstill[trainer]"'
_WAYS_TO_GET = {
    "vllm": 'pip install "potstill[teacher-cpu]" for CPUs, or "potstill[teacher]" for GPUs',
    "ray": f'{_TRAINER} to train, or "potstill[ray]" to serve',
    **dict.fromkeys(("pycld2", "rensa"), 'pip install "potstill[data]"'),
    "opentelemetry": 'pip install "potstill[otel]"',
    "lm_eval": 'pip install "potstill[eval]"',
    **dict.fromkeys(("accelerate", "gguf", "safetensors", "scipy", "tensorboard", "torch", "transformers"), _TRAINER),
}


def missing_module(error: ImportError) -> str:
    """Name the module that could not be found, and the command that installs it where an extra of ours has it."""
    first: BaseException | None = error
    while isinstance(first, ImportError) and first.name is None:  # torch raises a new error, without the name
        first = first.__cause__ or first.__context__
    name = first.name if isinstance(first, ImportError) and first.name else str(error)
    way_out = _WAYS_TO_GET.get(name.partition(".")[0])
    told = f"needs the module {name!r}, which is not installed"
    return told if way_out is None else f"{told}: {way_out}"
