"""AuraFlow."""

from __future__ import annotations

from neuraleraser.families.family import Blocks, Family, has_transformer

AURAFLOW = Family(
    name="auraflow",
    matches=has_transformer("AuraFlowTransformer2DModel"),
    blocks=Blocks(
        lists=("joint_transformer_blocks", "single_transformer_blocks"),
        text_first=("AuraFlowJointTransformerBlock",),
    ),
)
