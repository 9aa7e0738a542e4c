"""The sparse autoencoder itself: a dictionary of features that fire each on its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from neuraleraser.errors import DataError, FileError
from neuraleraser.io import tensor_file
from neuraleraser.io.cards import header_rows, make_card, plain, table
from neuraleraser.io.hub import HubFile
from neuraleraser.io.names import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

KIND = "sae"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


class SAE(nn.Module, HubFile):
    """n features on activations of width d:

        pre   = (x - b_dec) W_enc^T + b_enc        [..., n]
        z     = pre where pre > threshold, else 0  [..., n]
        x_hat = z W_dec + b_dec                    [..., d]

    Every feature has its own threshold >= 0 (a JumpReLU), so whether it fires depends on x alone and never
    on other features or vectors. Rows of W_dec have norm 1. Acts on raw activations: the scaling used in
    training is folded into the weights. `header` holds what is known about it (site, time scale, settings,
    measures) and is saved with it. Weights come frozen; gradients flow to x.

    Examples:
        >>> x = activation_matrix(pipe, prompts, [0, 1], [site], sampling=quick)[site]
        >>> sae.encode(x).shape, sae(x).shape  # features, and the activations that they add up to
        (torch.Size([512, 256]), torch.Size([512, 128]))
        >>> sae.save("canvas.safetensors")
        >>> SAE.load("canvas.safetensors")
        SAE(n=256, d=128)
    """

    NOUN: ClassVar = "SAE"
    FILES: ClassVar = ("sae.safetensors",)

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the weights of n features on activations of width d.

        Args:
            W_enc: Encoder rows, [n, d].
            b_enc: Encoder biases, [n].
            W_dec: Decoder rows, [n, d], each of norm 1.
            b_dec: Decoder bias, [d].
            threshold: Thresholds, [n], each >= 0.
            header: Facts about the SAE, as JSON; None: none.

        Raises:
            DataError: Shapes disagree, a row has another norm, or a threshold is negative.
        """
        super().__init__()
        given: dict[str, Tensor] = dict(zip(_NAMES, (W_enc, b_enc, W_dec, b_dec, threshold), strict=True))
        _check(given)
        for name, value in given.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
        self.header: dict[str, Any] = dict(header or {})

    @property
    def n_features(self) -> int:
        """Number of features, n."""
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations, d."""
        return self.W_enc.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Return the features of activations.

        Args:
            x: Raw activations, [..., d].

        Returns:
            z [..., n] >= 0, mostly zeros.

        Raises:
            DataError: `x` has another width.
        """
        if x.shape[-1:] != (self.d_in,):
            raise DataError(f"activations have shape {tuple(x.shape)}: this SAE takes [..., {self.d_in}]")
        pre = torch.nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        return torch.where(pre > self.threshold, pre, 0.0)

    def decode(self, z: Tensor) -> Tensor:
        """Return the activations that features stand for.

        Args:
            z: Features, [..., n].

        Returns:
            x_hat [..., d], raw activations.
        """
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of activations.

        Args:
            x: Raw activations, [..., d].

        Returns:
            x_hat [..., d].
        """
        return self.decode(self.encode(x))

    def save(self, path: str | os.PathLike[str], header: Mapping[str, Any] | None = None) -> None:
        """Write the SAE.

        Args:
            path: The file.
            header: Facts that are added to its own header or replace them; None: none.

        Raises:
            DataError: `load` would refuse it.
            FileError: The disk refuses.
        """
        tensors = {name: getattr(self, name) for name in _NAMES}
        whole = {**self.header, **(header or {})}
        if error := _header_error(whole):
            raise DataError(f"the SAE for {path} has {error}: change its header")
        tensor_file.save(path, KIND, tensors, whole)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SAE:
        """Read an SAE, onto the CPU.

        Args:
            path: The file.

        Returns:
            The SAE.

        Raises:
            FileError: The file is anything but a sound SAE file.
        """
        tensors, header = tensor_file.load(path, KIND)
        if set(tensors) != set(_NAMES):
            raise FileError(f"{path} holds tensors {printable(sorted(tensors)[:8])}: an SAE has {sorted(_NAMES)}")
        if error := _header_error(header):
            raise FileError(f"{path} has {error}: make or fetch it again")
        try:
            return cls(**tensors, header=header)
        except DataError as e:
            raise FileError(f"{path} is not a sound SAE: {e}") from e

    def generate_model_card(self, repo_id: str) -> ModelCard:
        """Return the card that `push_to_hub` uploads with it, made of its header.

        Args:
            repo_id: "owner/name" of its repository.

        Returns:
            The card.
        """
        model, site = self.header.get("model"), self.header.get("site")
        where = f" of {plain(model)}" if model else ""
        measures = self.header.get("measures")
        figures = header_rows(measures) if isinstance(measures, Mapping) else []
        parts = [
            f"# SAE: {self.n_features} features of {plain(site or 'a site that it does not name')}",
            f"A sparse autoencoder on activations{where} that are {self.d_in} wide, for NeuralEraser. A feature fires "
            "against a threshold of its own, whatever others do.",
            "## Use",
            f"```python\nfrom neuraleraser import SAE\n\nsae = SAE.from_pretrained({repo_id!r})\n"
            f"z = sae.encode(x)  # x [..., {self.d_in}] -> z [..., {self.n_features}], mostly zeros\n```",
            "## What was measured",
            table(("figure", "value"), figures) if figures else "Nothing: this file carries no measurement.",
            "## Settings",
            table(("setting", "value"), header_rows(self.header, ("model", "site", "measures"))),
        ]
        return make_card(parts, repo_id=repo_id, base=model)

    def extra_repr(self) -> str:
        return f"n={self.n_features}, d={self.d_in}"


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and value.isprintable()


# Fields of a header that the package reads as they are; all else is shown, or read with care.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "site": _is_line,
    "model": _is_line,
    "format": _is_line,
    "labels": lambda value: isinstance(value, list) and all(map(_is_line, value)),
}


def _header_error(header: Mapping[str, Any]) -> str | None:
    """Say which field of a header cannot be what it says, or None."""
    for field, fits in _FIELDS.items():
        if field in header and not fits(header[field]):
            return f"field {field} = {printable(header[field])}"
    return None


def _check(t: Mapping[str, Tensor]) -> None:
    """Raise DataError where the five tensors do not make an SAE."""
    shapes = {name: tuple(x.shape) for name, x in t.items()}
    shape = shapes["W_enc"]
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"W_enc has shape {shape}: expected [n, d]")
    n, d = shape
    if shapes != {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}:
        raise DataError(f"shapes {shapes} do not fit W_enc's n = {n}, d = {d}")
    if not all(x.is_floating_point() for x in t.values()):
        raise DataError(f"dtypes {[str(x.dtype) for x in t.values()]}: an SAE's tensors are floating point")
    off = (t["W_dec"].float().norm(dim=1) - 1).abs().max().item()
    if not off <= 1e-2:  # bfloat16 rows are off by up to 0.004
        raise DataError(f"a row of W_dec has a norm {off:.2g} away from 1: divide each row by its norm")
    if not bool((t["threshold"] >= 0).all()):
        raise DataError("a threshold is negative or NaN: a feature may fire for positive values only")
