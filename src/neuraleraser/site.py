"""Place in a pipeline where activations are read or edited, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neuraleraser.errors import SiteError

_TAPS = ("output", "update", "input")
_STREAMS = ("image", "text")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a pipeline where activations are read or edited.

    Name a whole block or attention, not a layer inside it: a tensor of four dimensions is taken for [B, C, H, W]. A
    block with one stream, such as a text encoder's, has the stream "image".

    Attributes:
        path: The module, dotted from the pipeline.
        tap: "output" is what the block returns, "update" what it adds to its input. "input" is what the block reads of
            the prompt, its encoder_hidden_states [B, tokens, d], with the stream "text".
        stream: "image" or "text".

    Examples:
        >>> read = Site("unet.up_blocks.1.attentions.0", "input", "text")
        >>> str(read)
        'unet.up_blocks.1.attentions.0:input:text'
        >>> Site.parse("unet.up_blocks.1.attentions.0:input") == read
        True
    """

    path: str
    tap: Literal["output", "update", "input"] = "output"
    stream: Literal["image", "text"] = "image"

    def __post_init__(self) -> None:
        if self.tap not in _TAPS or self.stream not in _STREAMS:
            raise SiteError(
                f"Site {self.path!r} with tap {self.tap!r} and stream {self.stream!r}: "
                f"a tap is one of {_TAPS}, a stream one of {_STREAMS}."
            )
        if ":" in self.path or not all(self.path.split(".")):
            raise SiteError(f"{self.path!r} is no module path; one looks like 'unet.up_blocks.1.attentions.0'.")

    def __str__(self) -> str:
        return f"{self.path}:{self.tap}:{self.stream}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site from text: the inverse of `str(site)`.

        Args:
            text: "path:tap:stream", or short "path", "path:update", "path:text" or "path:input".

        Returns:
            The site.

        Raises:
            SiteError: A part is neither a tap nor a stream, or the path is no module path.
        """
        path, *marks = text.split(":")
        tap = marks.pop(0) if marks and marks[0] in _TAPS else "output"
        stream = marks.pop(0) if marks and marks[0] in _STREAMS else "text" if tap == "input" else "image"
        if marks:
            neither = f"neither a tap ({', '.join(_TAPS)}) nor a stream ({', '.join(_STREAMS)})"
            wrong = "in the wrong place" if marks[0] in (*_TAPS, *_STREAMS) else neither
            raise SiteError(
                f"{text!r} is no site: {marks[0]!r} is {wrong}. Expected path, path:tap, path:stream or "
                "path:tap:stream."
            )
        return cls(path, tap, stream)  # type: ignore[arg-type]
