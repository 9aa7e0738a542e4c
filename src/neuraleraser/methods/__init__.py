"""Methods: what erases a concept, one file each. Our eraser, and the controls that every table needs beside it."""

from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.none import DoNothing
from neuraleraser.methods.string_filter import StringFilter, string_filters

__all__ = ["DoNothing", "EraserMethod", "StringFilter", "string_filters"]
