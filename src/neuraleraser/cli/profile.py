"""`neuraleraser profile`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.io.tables import text_table
from neuraleraser.settings import check_whole


@verb(app, "profile")
def profile(
    phrases: Positional[tuple[str, ...]],
    /,
    sae: str,
    site: str | None = None,
    model: str = "canvas",
    num_images: int = 20,
    top: int = 8,
    out: Path = Path("profile.safetensors"),
    machine: Machine = AUTOMATIC,
) -> None:
    """Say which features of an SAE carry concepts: statistics by timestep, and the features that tell best.

    Args:
        phrases: Concepts, such as "Van Gogh style" "cat"; each is compared with the others and with itself taken out.
        sae: The SAE: a file, a folder or a Hub id.
        site: Where the SAE reads; None: what its file says.
        model: The pipeline: canvas, a folder, or a Hub id.
        num_images: Images generated of each concept, and as many without it.
        top: Features listed for each concept.
        out: The profile's file.
    """
    import torch

    from neuraleraser.concepts import concept_of
    from neuraleraser.fitting.profile_concepts import profile_concepts
    from neuraleraser.io import tensor_file
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.sae import SAE, scores
    from neuraleraser.sites import Site

    if not phrases:
        raise ConceptError("no concept was named: pass phrases such as 'Van Gogh style' cat")
    check_whole("num_images", num_images, 1, 1000)
    check_whole("top", top, 1, 1000)
    check_outputs({"--out": out}, {"--sae": sae, "--model": model})
    loaded = SAE.from_pretrained(sae)
    where = site or loaded.header.get("site")
    if not where:
        raise SettingsError(f"{sae} does not say which site it reads: pass --site")
    pipe = machine.open_pipeline(model)
    asked = [concept_of(pipe, phrase) for phrase in phrases]
    stats = profile_concepts(pipe, loaded, Site.parse(where), asked, num_images)
    tensors = {"mean": stats.mean, "spread": stats.spread, "times": stats.times}
    header = {"names": list(stats.names), "site": str(where), "model": model}
    save_or_keep(out, lambda path: tensor_file.save(path, "profile", tensors, header))
    for concept in asked:
        score = scores.margin_score(stats, concept.name).mean(0)
        share = scores.saeuron_score(stats, concept.name).mean(0)
        head = ("feature", "gap to the worst neighbour", "SAeUron's share score")
        rows: list[tuple[str, ...]] = []
        for k in torch.topk(score, min(top, len(score))).indices.tolist():
            rows.append((str(k), f"{score[k]:.2f}", f"{share[k]:.4f}"))
        print(f"{concept.name}\n{text_table(rows, head)}\n")
    print(out)
