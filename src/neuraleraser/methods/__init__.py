"""Methods: what erases a concept, one file each. Our eraser, methods of others, and the controls beside them."""

from neuraleraser.methods.concept_removal_guidance import ConceptRemovalGuidance
from neuraleraser.methods.dynamic_negative_guidance import DynamicNegativeGuidance
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.none import DoNothing
from neuraleraser.methods.saeuron import SAeUronAsPublished
from neuraleraser.methods.string_filter import StringFilter, string_filters

__all__ = [
    "ConceptRemovalGuidance",
    "DoNothing",
    "DynamicNegativeGuidance",
    "EraserMethod",
    "SAeUronAsPublished",
    "StringFilter",
    "string_filters",
]
