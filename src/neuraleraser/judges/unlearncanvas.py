"""UnlearnCanvas's two classifiers, of styles and of objects (arXiv 2402.11846), as a judge.

Each is a ViT-L/16 at 224 pixels with a linear head. Their files hold it under timm's names of the tensors; transformers
computes it here, because timm needs torchvision to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from neuraleraser.errors import FileError
from neuraleraser.io import untrusted
from neuraleraser.io.tensor_file import load_foreign
from neuraleraser.judges.judgement import Judgement, check

PHOTOS = "Seed_Images"
"""What the benchmark calls photographs: an output of the style classifier, and none of its 50 styles."""
UNLEARNCANVAS_STYLES: tuple[str, ...] = (
    "Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm",
    "Color_Fantasy", "Comic_Etch", "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn",
    "Expressionism", "Fauvism", "French", "Glowing_Sunset", "Gorgeous_Love", "Greenfield", "Impressionism", "Ink_Art",
    "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower", "Monet", "Mosaic", "Neon_Lines", "On_Fire",
    "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust", PHOTOS, "Sketch", "Sponge_Dabbed",
    "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh", "Vibrant_Flow", "Warm_Love", "Warm_Smear",
    "Watercolor", "Winter",
)  # fmt: skip
"""Names of the style classifier's outputs, in their order (`theme_available` in the benchmark's code)."""
UNLEARNCANVAS_OBJECTS: tuple[str, ...] = (
    "Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs", "Horses",
    "Human", "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees", "Waterfalls",
)  # fmt: skip
"""Names of the object classifier's outputs, in their order (`class_available`)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision transformer: width of its vectors, blocks, heads, pixels of a patch and of the image."""

    width: int
    depth: int
    heads: int
    patch: int
    side: int


VIT_LARGE = Shape(width=1024, depth=24, heads=16, patch=16, side=224)
"""timm's vit_large_patch16_224.augreg_in21k, from which the benchmark trained both."""


class UnlearnCanvasJudge:
    """The benchmark's classifiers.

    They read what its own fine-tuned model draws; on other models' images they mean little (of a stock Stable
    Diffusion's Van Goghs they know a tenth). `p_style` and `p_object` are each a softmax, so that of both the most
    probable one is the benchmark's answer.

    Attributes:
        styles: The benchmark's styles, 51 with `Seed_Images`, in the order of the columns.
        objects: The benchmark's 20 objects, in the order of the columns.
        thresholds: 0.5 for a style; what is above it is the answer. Just below 1/20 for an object: the answer is always
            above it, so that in `evaluation.metrics` one object asked for is right exactly when it is the answer, and
            an object counts as gone only when it is less probable than by chance.
        artefact_threshold: None, as they measure no artefacts.
        figures: None given; the files bring none that can be checked.

    Examples:
        >>> judge = UnlearnCanvasJudge.load("style50.pth", "style50_cls.pth")
        >>> seen = judge(images)
        >>> seen.p_style.shape, seen.p_object.shape
        ((2, 51), (2, 20))
    """

    styles: tuple[str, ...] = UNLEARNCANVAS_STYLES
    objects: tuple[str, ...] = UNLEARNCANVAS_OBJECTS
    artefact_threshold = None

    def __init__(self, style: Vit, object: Vit) -> None:
        self.thresholds = dict.fromkeys(self.styles, 0.5) | dict.fromkeys(self.objects, 1 / (len(self.objects) + 1))
        self.figures: dict[str, Any] = {}
        self._style, self._object = style, object

    @classmethod
    def load(cls, style: str | Path, object: str | Path, device: str | torch.device = "cpu") -> UnlearnCanvasJudge:
        """Open the benchmark's classifiers.

        Args:
            style: Its `style50.pth`, or the same state dict as safetensors.
            object: Its `style50_cls.pth`, or the same state dict as safetensors.
            device: Device to run them on.

        Returns:
            The judge.

        Raises:
            FileError: A file is missing or damaged, holds more than tensors and plain values, or is not that
                classifier.
        """
        heads = ((style, cls.styles, "style50.pth"), (object, cls.objects, "style50_cls.pth"))
        return cls(
            *(
                Vit(_load_weights(Path(path), len(names), usual, VIT_LARGE), VIT_LARGE, device)
                for path, names, usual in heads
            )
        )

    def __call__(self, images: NDArray[np.uint8]) -> Judgement:
        """Judge images.

        An image's figures do not depend on its neighbours, but for rounding.

        Args:
            images: RGB images, uint8 [N, H, W, 3] of any size; N may be 0.

        Returns:
            The probabilities.

        Raises:
            DataError: `images` is anything else.
        """
        check(images)
        return Judgement(self._style(images), self._object(images), None)


class Vit:
    """A classifying vision transformer (arXiv 2010.11929) from a state dict with timm's names: images to softmax."""

    def __init__(self, weights: Mapping[str, Tensor], shape: Shape, device: str | torch.device) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            image_size=shape.side,
            patch_size=shape.patch,
            layer_norm_eps=1e-6,
        )
        config.num_labels = self.outputs = len(weights["head.bias"])
        # Not by load_state_dict: only from_pretrained knows these names in every version of transformers.
        model: Any = ViTForImageClassification.from_pretrained(
            None, config=config, state_dict=transformers_names(weights)
        )
        self.model, self.side, self.device = model.eval().to(device), shape.side, torch.device(device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8], batch: int = 16) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> probabilities [N, outputs], float32."""
        out = [np.zeros((0, self.outputs), np.float32)]
        for start in range(0, len(images), batch):
            pixels = prepare_images(images[start : start + batch], self.side).to(self.device)
            out.append(self.model(pixels).logits.softmax(1).cpu().numpy())
        return np.concatenate(out)


_NAMES = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Names that files on the Hub have for what timm calls so, in a block behind the block's own."""


def transformers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a classifier's tensors by the names of transformers' files instead of timm's; queries, keys and values,
    which are one tensor in timm, are three."""
    named = {
        "vit.embeddings.cls_token": weights["cls_token"],
        "vit.embeddings.position_embeddings": weights["pos_embed"],
    }
    for name in weights.keys() - {"cls_token", "pos_embed"}:
        part, _, leaf = name.rpartition(".")
        home = ""
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            home = f"vit.encoder.layer.{number}."
        if part == "attn.qkv":
            for third, x in zip(("query", "key", "value"), weights[name].chunk(3), strict=True):
                named[f"{home}attention.attention.{third}.{leaf}"] = x
        else:
            named[f"{home}{_NAMES[part]}.{leaf}"] = weights[name]
    return named


def prepare_images(images: NDArray[np.uint8], side: int) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, side, side] in -1..1.

    Resized without keeping the ratio, by Pillow's bilinear filter: what torchvision's Resize does to a Pillow image.
    """
    resized = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)) for x in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5).contiguous()


def tensor_shapes(shape: Shape, outputs: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a classifier."""
    d, hidden, positions = shape.width, 4 * shape.width, (shape.side // shape.patch) ** 2 + 1
    sizes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, positions, d),
        "patch_embed.proj.weight": (d, 3, shape.patch, shape.patch),
        "patch_embed.proj.bias": (d,),
    }
    linears = {"norm": (d,), "head": (outputs, d)}
    for block in (f"blocks.{i}" for i in range(shape.depth)):
        linears |= {f"{block}.norm1": (d,), f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        linears |= {f"{block}.norm2": (d,), f"{block}.mlp.fc1": (hidden, d), f"{block}.mlp.fc2": (d, hidden)}
    for name, size in linears.items():
        sizes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return sizes


def _load_weights(path: Path, outputs: int, usual: str, shape: Shape) -> dict[str, Tensor]:
    """The classifier's tensors in float32, once all of them, and no others, are there in the right shapes."""
    hint = f"pass the benchmark's {usual}, which has {outputs} outputs"
    if path.suffix == ".safetensors":
        state: Any = load_foreign(path)
    else:
        state = untrusted.read_pickle(path, again=hint)
        # The benchmark keeps its optimizer's state beside the weights.
        state = state.get("model_state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise FileError(f"{path} holds no state dict of a classifier: {hint}")
    wanted = tensor_shapes(shape, outputs)
    lacking, foreign = [name for name in wanted if name not in state], [name for name in state if name not in wanted]
    if lacking or foreign:
        what = f"lacks {lacking[0]!r}" if lacking else f"has {str(foreign[0])[:60]!r}"
        raise FileError(
            f"{path} is no ViT of {shape.depth} blocks in timm's layout (it {what}, and {len(lacking)} of its "
            f"{len(wanted)} tensors are missing): {hint}"
        )
    found = getattr(state["head.bias"], "shape", None)
    if found != (outputs,):
        raise FileError(f"{path} has a 'head.bias' of shape {tuple(found or ())}, not {(outputs,)}: {hint}")
    return {name: untrusted.get_tensor(state, name, size, path).float() for name, size in wanted.items()}
