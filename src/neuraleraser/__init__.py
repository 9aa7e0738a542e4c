"""NeuralEraser takes one concept out of a text-to-image diffusion model and measures how well it stays out.

Public names are loaded when first used, so `import neuraleraser` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a name is published here, in `_HOME` and in `__all__`; a test holds that they agree
    from neuraleraser.activations import Shards as Shards
    from neuraleraser.activations import activation_matrix as activation_matrix
    from neuraleraser.activations import activation_stream as activation_stream
    from neuraleraser.activations import collect as collect
    from neuraleraser.activations import measure_loss_recovered as measure_loss_recovered
    from neuraleraser.activations import write_shards as write_shards
    from neuraleraser.auditing import audit as audit
    from neuraleraser.canvas.canvas_judge import CanvasJudge as CanvasJudge
    from neuraleraser.concepts import Concept as Concept
    from neuraleraser.concepts import Pair as Pair
    from neuraleraser.concepts import add_context_pairs as add_context_pairs
    from neuraleraser.concepts import canvas_concept as canvas_concept
    from neuraleraser.concepts import default_neighbours as default_neighbours
    from neuraleraser.diagnosis import diagnose as diagnose
    from neuraleraser.eraser import Eraser as Eraser
    from neuraleraser.eraser import EraserHeader as EraserHeader
    from neuraleraser.eraser import Trace as Trace
    from neuraleraser.eraser import attach as attach
    from neuraleraser.eraser import delete_erasers as delete_erasers
    from neuraleraser.eraser import disable_erasers as disable_erasers
    from neuraleraser.eraser import enable_erasers as enable_erasers
    from neuraleraser.eraser import eraser_trace as eraser_trace
    from neuraleraser.eraser import get_active_erasers as get_active_erasers
    from neuraleraser.eraser import get_list_erasers as get_list_erasers
    from neuraleraser.eraser import load_eraser as load_eraser
    from neuraleraser.eraser import model_card as model_card
    from neuraleraser.eraser import set_erasers as set_erasers
    from neuraleraser.eraser import unload_erasers as unload_erasers
    from neuraleraser.errors import ConceptError as ConceptError
    from neuraleraser.errors import ConceptRefusedError as ConceptRefusedError
    from neuraleraser.errors import ConceptRemainsWarning as ConceptRemainsWarning
    from neuraleraser.errors import DataError as DataError
    from neuraleraser.errors import EraserNotAppliedError as EraserNotAppliedError
    from neuraleraser.errors import FileError as FileError
    from neuraleraser.errors import MissingDependencyError as MissingDependencyError
    from neuraleraser.errors import NeuralEraserError as NeuralEraserError
    from neuraleraser.errors import SettingsError as SettingsError
    from neuraleraser.errors import SiteError as SiteError
    from neuraleraser.errors import SplitError as SplitError
    from neuraleraser.errors import UnseenRouteWarning as UnseenRouteWarning
    from neuraleraser.evaluation.certificate import certify as certify
    from neuraleraser.evaluation.certificate import compare_folder as compare_folder
    from neuraleraser.evaluation.certificate import read_certificate as read_certificate
    from neuraleraser.evaluation.certificate import redraw as redraw
    from neuraleraser.evaluation.comparison import compare_reports as compare_reports
    from neuraleraser.evaluation.evaluate import evaluate as evaluate
    from neuraleraser.evaluation.i2p_cells import i2p_protocol as i2p_protocol
    from neuraleraser.evaluation.method import Method as Method
    from neuraleraser.evaluation.protocol import Cell as Cell
    from neuraleraser.evaluation.protocol import EvaluationProtocol as EvaluationProtocol
    from neuraleraser.evaluation.protocol import StartImage as StartImage
    from neuraleraser.evaluation.report import Report as Report
    from neuraleraser.evaluation.report_files import write_report as write_report
    from neuraleraser.evaluation.unlearncanvas_cells import unlearncanvas_protocol as unlearncanvas_protocol
    from neuraleraser.families import Family as Family
    from neuraleraser.families.defaults import default_sampling as default_sampling
    from neuraleraser.families.opening import open_pipeline as open_pipeline
    from neuraleraser.fitting import Reference as Reference
    from neuraleraser.fitting import calibrate as calibrate
    from neuraleraser.fitting import fit_saeuron as fit_saeuron
    from neuraleraser.fitting import import_reference as import_reference
    from neuraleraser.fitting import make_reference as make_reference
    from neuraleraser.fitting.clip_judge import calibrate_clip_judge as calibrate_clip_judge
    from neuraleraser.fitting.fit import fit as fit
    from neuraleraser.fitting.from_phrase import erase as erase
    from neuraleraser.judges import ClipJudge as ClipJudge
    from neuraleraser.judges import Judge as Judge
    from neuraleraser.judges import Judgement as Judgement
    from neuraleraser.judges import NudeNetJudge as NudeNetJudge
    from neuraleraser.judges import UnlearnCanvasJudge as UnlearnCanvasJudge
    from neuraleraser.methods import DoNothing as DoNothing
    from neuraleraser.methods import EraserMethod as EraserMethod
    from neuraleraser.methods import StringFilter as StringFilter
    from neuraleraser.methods import string_filters as string_filters
    from neuraleraser.prompts import read_prompts as read_prompts
    from neuraleraser.sae import SAE as SAE
    from neuraleraser.sae import TrainSettings as TrainSettings
    from neuraleraser.sampling import generate as generate
    from neuraleraser.settings import AttackBudget as AttackBudget
    from neuraleraser.settings import EvaluateSettings as EvaluateSettings
    from neuraleraser.settings import FitSettings as FitSettings
    from neuraleraser.settings import SAeUronSettings as SAeUronSettings
    from neuraleraser.settings import Sampling as Sampling
    from neuraleraser.settings import StreamSettings as StreamSettings
    from neuraleraser.site import Site as Site
    from neuraleraser.sites import candidate_sites as candidate_sites
    from neuraleraser.sites import cross_attention_sites as cross_attention_sites
    from neuraleraser.sites import edit as edit
    from neuraleraser.sites import record as record
    from neuraleraser.sites import text_encoder_sites as text_encoder_sites

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    "AttackBudget": "settings",
    "CanvasJudge": "canvas.canvas_judge",
    "Cell": "evaluation.protocol",
    "ClipJudge": "judges",
    "Concept": "concepts",
    "ConceptError": "errors",
    "ConceptRefusedError": "errors",
    "ConceptRemainsWarning": "errors",
    "DataError": "errors",
    "DoNothing": "methods",
    "Eraser": "eraser",
    "EraserHeader": "eraser",
    "EraserMethod": "methods",
    "EraserNotAppliedError": "errors",
    "EvaluateSettings": "settings",
    "EvaluationProtocol": "evaluation.protocol",
    "Family": "families",
    "FileError": "errors",
    "FitSettings": "settings",
    "Judge": "judges",
    "Judgement": "judges",
    "Method": "evaluation.method",
    "MissingDependencyError": "errors",
    "NeuralEraserError": "errors",
    "NudeNetJudge": "judges",
    "Pair": "concepts",
    "Reference": "fitting",
    "Report": "evaluation.report",
    "SAE": "sae",
    "SAeUronSettings": "settings",
    "Sampling": "settings",
    "SettingsError": "errors",
    "Shards": "activations",
    "Site": "site",
    "SiteError": "errors",
    "SplitError": "errors",
    "StartImage": "evaluation.protocol",
    "StreamSettings": "settings",
    "StringFilter": "methods",
    "Trace": "eraser",
    "TrainSettings": "sae",
    "UnlearnCanvasJudge": "judges",
    "UnseenRouteWarning": "errors",
    "activation_matrix": "activations",
    "activation_stream": "activations",
    "add_context_pairs": "concepts",
    "attach": "eraser",
    "audit": "auditing",
    "calibrate": "fitting",
    "calibrate_clip_judge": "fitting.clip_judge",
    "candidate_sites": "sites",
    "canvas_concept": "concepts",
    "certify": "evaluation.certificate",
    "collect": "activations",
    "compare_folder": "evaluation.certificate",
    "compare_reports": "evaluation.comparison",
    "cross_attention_sites": "sites",
    "default_neighbours": "concepts",
    "default_sampling": "families.defaults",
    "delete_erasers": "eraser",
    "diagnose": "diagnosis",
    "disable_erasers": "eraser",
    "edit": "sites",
    "enable_erasers": "eraser",
    "erase": "fitting.from_phrase",
    "eraser_trace": "eraser",
    "evaluate": "evaluation.evaluate",
    "fit": "fitting.fit",
    "fit_saeuron": "fitting",
    "generate": "sampling",
    "get_active_erasers": "eraser",
    "get_list_erasers": "eraser",
    "i2p_protocol": "evaluation.i2p_cells",
    "import_reference": "fitting",
    "load_eraser": "eraser",
    "make_reference": "fitting",
    "measure_loss_recovered": "activations",
    "model_card": "eraser",
    "open_pipeline": "families.opening",
    "read_certificate": "evaluation.certificate",
    "read_prompts": "prompts",
    "record": "sites",
    "redraw": "evaluation.certificate",
    "set_erasers": "eraser",
    "string_filters": "methods",
    "text_encoder_sites": "sites",
    "unlearncanvas_protocol": "evaluation.unlearncanvas_cells",
    "unload_erasers": "eraser",
    "write_report": "evaluation.report_files",
    "write_shards": "activations",
}
"""Module of every public name."""

__all__ = [
    "SAE",
    "AttackBudget",
    "CanvasJudge",
    "Cell",
    "ClipJudge",
    "Concept",
    "ConceptError",
    "ConceptRefusedError",
    "ConceptRemainsWarning",
    "DataError",
    "DoNothing",
    "Eraser",
    "EraserHeader",
    "EraserMethod",
    "EraserNotAppliedError",
    "EvaluateSettings",
    "EvaluationProtocol",
    "Family",
    "FileError",
    "FitSettings",
    "Judge",
    "Judgement",
    "Method",
    "MissingDependencyError",
    "NeuralEraserError",
    "NudeNetJudge",
    "Pair",
    "Reference",
    "Report",
    "SAeUronSettings",
    "Sampling",
    "SettingsError",
    "Shards",
    "Site",
    "SiteError",
    "SplitError",
    "StartImage",
    "StreamSettings",
    "StringFilter",
    "Trace",
    "TrainSettings",
    "UnlearnCanvasJudge",
    "UnseenRouteWarning",
    "activation_matrix",
    "activation_stream",
    "add_context_pairs",
    "attach",
    "audit",
    "calibrate",
    "calibrate_clip_judge",
    "candidate_sites",
    "canvas_concept",
    "certify",
    "collect",
    "compare_folder",
    "compare_reports",
    "cross_attention_sites",
    "default_neighbours",
    "default_sampling",
    "delete_erasers",
    "diagnose",
    "disable_erasers",
    "edit",
    "enable_erasers",
    "erase",
    "eraser_trace",
    "evaluate",
    "fit",
    "fit_saeuron",
    "generate",
    "get_active_erasers",
    "get_list_erasers",
    "i2p_protocol",
    "import_reference",
    "load_eraser",
    "make_reference",
    "measure_loss_recovered",
    "model_card",
    "open_pipeline",
    "read_certificate",
    "read_prompts",
    "record",
    "redraw",
    "set_erasers",
    "string_filters",
    "text_encoder_sites",
    "unlearncanvas_protocol",
    "unload_erasers",
    "write_report",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
