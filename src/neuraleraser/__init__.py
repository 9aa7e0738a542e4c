"""NeuralEraser takes one concept out of a text-to-image diffusion model and measures how well it stays out.

Public names are loaded when first used, so `import neuraleraser` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Every public name and the module it lives in: to publish a name, add one line here.
_HOME: dict[str, str] = {
    "CanvasJudge": "judges",
    "Cell": "evaluation.protocol",
    "ClipJudge": "judges",
    "Concept": "concepts",
    "ConceptError": "errors",
    "DataError": "errors",
    "Dictionary": "fit",
    "Eraser": "eraser",
    "EraserMethod": "methods",
    "EvaluateSettings": "settings",
    "EvaluationProtocol": "evaluation.protocol",
    "FileError": "errors",
    "FitSettings": "settings",
    "Judge": "judges",
    "Judgement": "judges",
    "Method": "evaluation.method",
    "NeuralEraserError": "errors",
    "NoMethod": "methods",
    "NotApplied": "errors",
    "NudeNetJudge": "judges",
    "Refused": "errors",
    "Report": "evaluation.report",
    "SAE": "sae",
    "Sampling": "settings",
    "SettingsError": "errors",
    "Shards": "activations",
    "Site": "sites",
    "SiteError": "errors",
    "SplitError": "errors",
    "UnseenRoute": "errors",
    "StreamSettings": "settings",
    "StringFilter": "methods",
    "Trace": "eraser",
    "TrainSettings": "sae",
    "UnlearnCanvasJudge": "judges",
    "activation_stream": "activations",
    "attach": "eraser",
    "bank": "activations",
    "calibrate": "fit",
    "candidate_sites": "sites",
    "canvas_concept": "concepts",
    "canvas_filters": "methods",
    "clip_judge": "judges",
    "collect": "activations",
    "cross_attention_sites": "sites",
    "disable_erasers": "eraser",
    "doctor": "diagnosis",
    "edit": "sites",
    "eraser_trace": "eraser",
    "evaluate": "evaluation.evaluate",
    "file_concept": "concepts",
    "generate": "sampling",
    "import_dictionary": "fit",
    "load_dictionary": "fit",
    "load_eraser": "eraser",
    "model_card": "eraser",
    "open_pipeline": "models",
    "own_dictionary": "fit",
    "phrase_concept": "concepts",
    "record": "sites",
    "set_erasers": "eraser",
    "shipped_neighbours": "concepts",
    "substitution": "activations",
    "text_encoder_sites": "sites",
    "unload_erasers": "eraser",
    "with_neighbours": "concepts",
    "write_report": "evaluation.report_files",
    "write_shards": "activations",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
