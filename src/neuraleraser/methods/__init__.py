"""Methods: what erases a concept, one file each. Our eraser, methods of others, and the controls beside them."""

from neuraleraser.methods.casteer import CASteer
from neuraleraser.methods.concept_pinpoint_eraser import ConceptPinpointEraser, CPESettings
from neuraleraser.methods.concept_removal_guidance import ConceptRemovalGuidance
from neuraleraser.methods.concept_steerers import ConceptSteerers
from neuraleraser.methods.difference_of_means import DifferenceOfMeans
from neuraleraser.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from neuraleraser.methods.erased_stable_diffusion import ErasedStableDiffusion, ESDSettings
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.gated_low_rank import GLoCE
from neuraleraser.methods.negative_prompt import NegativePrompt
from neuraleraser.methods.none import DoNothing
from neuraleraser.methods.oracle import Oracle
from neuraleraser.methods.patch_replacement import PatchReplacement
from neuraleraser.methods.random_features import RandomFeatures
from neuraleraser.methods.saemnesia import SAEmnesia, SAEmnesiaSettings
from neuraleraser.methods.saeuron import SAeUronAsPublished
from neuraleraser.methods.safe_latent_diffusion import SafeLatentDiffusion
from neuraleraser.methods.salun import SalUn, SalUnSettings
from neuraleraser.methods.stereo import Stereo, StereoSettings
from neuraleraser.methods.string_filter import StringFilter, string_filters
from neuraleraser.methods.unified_concept_editing import UnifiedConceptEditing

__all__ = [
    "CASteer",
    "CPESettings",
    "ConceptPinpointEraser",
    "ConceptRemovalGuidance",
    "ConceptSteerers",
    "DifferenceOfMeans",
    "DoNothing",
    "DynamicNegativeGuidance",
    "ESDSettings",
    "ErasedStableDiffusion",
    "EraserMethod",
    "GLoCE",
    "NegativePrompt",
    "Oracle",
    "PatchReplacement",
    "RandomFeatures",
    "SAEmnesia",
    "SAEmnesiaSettings",
    "SAeUronAsPublished",
    "SafeLatentDiffusion",
    "SalUn",
    "SalUnSettings",
    "Stereo",
    "StereoSettings",
    "StringFilter",
    "UnifiedConceptEditing",
    "string_filters",
]
