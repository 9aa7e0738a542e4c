"""Methods: what erases a concept, one file each. Our eraser, rivals, and the controls of every table."""

from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.none import DoNothing
from neuraleraser.methods.saeuron import SAeUronAsPublished
from neuraleraser.methods.string_filter import StringFilter, string_filters

__all__ = ["DoNothing", "EraserMethod", "SAeUronAsPublished", "StringFilter", "string_filters"]
