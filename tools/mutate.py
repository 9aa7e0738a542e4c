"""Break the product on purpose, one thing at a time, and see whether the tests notice.

    python tools/mutate.py                  # every mutation: the table, and exit code 1 if one survives
    python tools/mutate.py targets seeds    # some of them, by name
    python tools/mutate.py --list           # what there is
    python tools/mutate.py --whole          # where the named tests stay green, the whole suite without slow tests

Each mutation is made alone, in a temporary copy of the tree, and the tests that should notice it are run there. First
they are run unchanged: what is red without a mutation says nothing. A mutation whose old text is not found exactly once
is an error: the code has moved on, and the mutation has to follow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = (
    "src",
    "tests",
    "tools",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
)
WEIGHTS = Path("src/neuraleraser/canvas/weights")
PRODUCT = "tests/canvas/test_product.py"
FIT = "tests/fit/test_fit_whole.py"
LIMIT = 1200
"""Seconds that a run of tests may take."""


@dataclass(frozen=True)
class Text:
    """Replacement of `old`, which a file has exactly once, by `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """One thing that is broken: texts that are replaced, or weights that are changed; the tests that must notice."""

    name: str
    what: str
    change: tuple[Text, ...] | Callable[[Path], None]
    tests: tuple[str, ...]


class Stale(Exception):
    """A mutation that does not apply: its old text is not in the file exactly once."""


def apply(mutation: Mutation, tree: Path) -> None:
    """Make the mutation in `tree`. Raises Stale."""
    if callable(mutation.change):
        mutation.change(tree)
        return
    for text in mutation.change:
        path = tree / text.file
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := before.count(text.old)) != 1:
            raise Stale(f"{mutation.name}: {text.file} has {text.old[:60]!r} {count} times, and should have it once")
        path.write_text(before.replace(text.old, text.new), encoding="utf-8")


def _rewrite(path: Path, change: Callable[[dict], dict]) -> None:  # tensors by name to tensors by name
    """Change the tensors of a safetensors file, which keeps its metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    real = path.resolve()
    path.unlink()  # the copy has a link to the shipped file
    assert real.exists()
    save_file(change(tensors), path, metadata)


def shuffle_denoiser(tree: Path) -> None:
    """Shuffle the numbers of each of the denoiser's tensors."""
    import torch

    def shuffled(tensors: dict) -> dict:
        g = torch.Generator().manual_seed(0)
        return {
            name: x.flatten()[torch.randperm(x.numel(), generator=g)].view_as(x).contiguous()
            for name, x in tensors.items()
        }

    (path,) = (tree / WEIGHTS / "pipeline" / "unet").glob("*.safetensors")
    _rewrite(path, shuffled)


def roll_labelled_rows(tree: Path) -> None:
    """Give each labelled feature the next one's rows."""
    import json

    from safetensors import safe_open

    path = tree / WEIGHTS / "dictionary" / "sae.safetensors"
    with safe_open(path, "pt") as file:
        count = len(json.loads(file.metadata()["header"])["labels"])

    def rolled(tensors: dict) -> dict:
        for name in ("W_enc", "W_dec", "b_enc", "threshold"):
            tensors[name][:count] = tensors[name][:count].roll(1, 0)
        return tensors

    _rewrite(path, rolled)


def roll_judge_classes(tree: Path) -> None:
    """Give each class of the second judge the next one's weights in its last layers."""

    def rolled(tensors: dict) -> dict:
        return {name: x.roll(1, 0).contiguous() if x.shape[:1] in ((25,), (20,)) else x for name, x in tensors.items()}

    _rewrite(tree / WEIGHTS / "judge-second.safetensors", rolled)


_FITTING = "src/neuraleraser/fit/fitting.py"
_GATE = "src/neuraleraser/fit/gate.py"
_RUNTIME = "src/neuraleraser/eraser/runtime.py"
_BATCHED = "src/neuraleraser/eraser/batched.py"
_LAYOUT = "src/neuraleraser/sites/layout.py"
_SAMPLING = "src/neuraleraser/sampling.py"
_OWN = "    lessons = [Lesson(a, b.prediction) for a, b in zip(crossed, plain, strict=True)] * 2\n"
_DRAWN = "    return lessons + [Lesson(a, _prediction(pipe, a, b)) for a, b in zip(shown, plain, strict=True)]\n"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "targets",
        "the edit is fitted to the concept's own predictions, so it learns nothing",
        (
            Text(_FITTING, _OWN, _OWN.replace("b.prediction", "a.prediction")),
            Text(_FITTING, _DRAWN, _DRAWN.replace("_prediction(pipe, a, b)", "a.prediction")),
        ),
        (f"{FIT}::test_targets_are_the_matched_prompt_s_predictions", PRODUCT),
    ),
    Mutation(
        "targets-drawn-with",
        "at states drawn with the concept the target is its own prediction",
        (Text(_FITTING, _DRAWN, _DRAWN.replace("_prediction(pipe, a, b)", "a.prediction")),),
        (f"{FIT}::test_targets_are_the_matched_prompt_s_predictions",),
    ),
    Mutation(
        "negatives",
        "rows that show the concept count as background",
        (
            Text(
                _FITTING,
                "    lacks = known.pooled[rows_without(concept, known.prompts, known.labels)]\n",
                "    lacks = known.pooled\n",
            ),
        ),
        (f"{FIT}::test_rows_that_show_the_concept_are_no_background",),
    ),
    Mutation(
        "seeds",
        "the two pictures of a pair are drawn from different noise",
        (
            Text(
                _FITTING,
                "[p.shows for p in pairs], seeds, sampling",
                "[p.shows for p in pairs], [seed + 500 for seed in seeds], sampling",
            ),
        ),
        (f"{FIT}::test_a_pair_is_drawn_from_the_same_noise",),
    ),
    Mutation(
        "crossed",
        "the gate is fitted without the states drawn without the concept",
        (
            Text(
                _FITTING,
                "torch.cat([conditional(pooled_shown), pooled_crossed])[:, at]",
                "conditional(pooled_shown)[:, at]",
            ),
        ),
        (f"{FIT}::test_the_gate_is_fitted_to_states_drawn_without_the_concept_too",),
    ),
    Mutation(
        "own-matches",
        "the concept's matched prompts are no background of its gate",
        (Text(_FITTING, "    lacks = torch.cat([lacks, own])\n", ""),),
        (f"{FIT}::test_the_gate_is_fitted_to_states_drawn_without_the_concept_too",),
    ),
    Mutation(
        "reference",
        "an eraser's header does not say what its dictionary was made with",
        (Text(_FITTING, '        "reference": known.provenance.in_short(),\n', ""),),
        (f"{FIT}::test_the_whole_fit",),
    ),
    Mutation(
        "matches-said",
        "an eraser's header leaves out the matched prompts it was made with",
        (Text(_FITTING, "for prompt in (pair.shows, pair.without)]", "for prompt in (pair.shows,)]"),),
        (f"{FIT}::test_the_whole_fit",),
    ),
    Mutation(
        "any-dictionary",
        "the canvas's dictionary is taken for any pipeline",
        (Text(_FITTING, "    if not speaks_canvas(pipe):\n", "    if False:\n"),),
        (f"{FIT}::test_no_dictionary_is_taken_for_another_pipeline_s",),
    ),
    Mutation(
        "width",
        "a dictionary of another width is not refused",
        (Text(_FITTING, "    if width != known.sae.d:\n", "    if False:\n"),),
        (f"{FIT}::test_no_dictionary_is_taken_for_another_pipeline_s",),
    ),
    Mutation(
        "lower-bound",
        "a gate's lower bound lies below half of the background",
        (Text(_GATE, "lacks.quantile(0.995, 0, interpolation", "lacks.quantile(0.4, 0, interpolation"),),
        ("tests/fit/test_fit_gate.py::test_bounds_part_what_is_apart",),
    ),
    Mutation(
        "decoder-bias",
        "a gate's features leave out the SAE's decoder bias",
        (Text(_GATE, "bias=(sae.b_enc[f].float() - rows @ sae.b_dec.float()),", "bias=sae.b_enc[f].float().clone(),"),),
        ("tests/fit/test_fit_gate.py::test_the_gate_weighs_the_sae_s_own_features",),
    ),
    Mutation(
        "bins-reversed",
        "a gate's bounds belong to the other end of sampling",
        (Text(_GATE, "        low=low[order].clone(),\n", "        low=low.clone(),\n"),),
        ("tests/fit/test_fit_gate.py::test_the_gate_weighs_the_sae_s_own_features",),
    ),
    Mutation(
        "speaks-against",
        "what a neighbour alone has does not speak against the concept",
        (
            Text(
                _GATE,
                "    weight = regress(on[..., features], off[..., features])\n",
                "    weight = regress(on[..., features], off[..., features]).abs()\n",
            ),
        ),
        ("tests/fit/test_fit_gate.py::test_what_only_neighbours_have_speaks_against",),
    ),
    Mutation(
        "labels-ignored",
        "labels of a dictionary's rows say nothing of what they show",
        (Text("src/neuraleraser/fit/shown.py", "    if any(named):\n", "    if False:\n"),),
        ("tests/fit/test_fit_shown.py",),
    ),
    Mutation(
        "imported-labels",
        "an imported dictionary drops what its prompts show",
        (Text("src/neuraleraser/fit/importing.py", "zip(prompts, labels or [()]", "zip(prompts, [()]"),),
        ("tests/fit/test_fit_importing.py::test_what_shows_the_concept_is_no_background_for_it",),
    ),
    Mutation(
        "calibrated-as-the-canvas",
        "an eraser is calibrated as the canvas is sampled, however it was fitted",
        (
            Text(
                "src/neuraleraser/fit/calibrating.py",
                "    usual = sampling_of(pipe, eraser.header)\n",
                "    usual = Sampling()\n",
            ),
        ),
        ("tests/fit/test_fit_sampling.py",),
    ),
    Mutation(
        "object-site",
        "an object of SDXL is looked for where style lies",
        (
            Text(
                "src/neuraleraser/models.py",
                'Site("unet.down_blocks.2.attentions.1", "update"), "object", "composition"',
                'Site("unet.down_blocks.2.attentions.1", "update"), "", "composition"',
            ),
            Text(
                "src/neuraleraser/models.py",
                'Site("unet.up_blocks.0.attentions.1", "update"), "style", "colour',
                'Site("unet.up_blocks.0.attentions.1", "update"), "any", "colour',
            ),
        ),
        ("tests/test_models.py::test_each_kind_is_looked_for_where_it_was_found",),
    ),
    Mutation(
        "one-threshold",
        "the doctor compares every class with one threshold",
        (
            Text(
                "src/neuraleraser/diagnosis.py",
                "return p > judge.thresholds[name]\n",
                "return p > next(iter(judge.thresholds.values()))\n",
            ),
        ),
        ("tests/test_doctor.py::test_a_class_s_own_threshold_decides",),
    ),
    Mutation(
        "sign",
        "a correction is taken away instead of added",
        (
            Text(_LAYOUT, "    new = out - (0 - delta)\n", "    new = out - delta\n"),
            Text(
                _LAYOUT,
                "torch.sub(out, torch.sub(delta.new_zeros(()), delta, out=delta), out=delta)",
                "torch.sub(out, delta, out=delta)",
            ),
        ),
        ("tests/test_eraser.py::test_strength_scales_the_edit",),
    ),
    Mutation(
        "strength",
        "an eraser acts in full, whatever its strength",
        (Text(_RUNTIME, "        return own * opening\n", "        return opening\n"),),
        ("tests/test_eraser.py::test_strength_scales_the_edit",),
    ),
    Mutation(
        "refuse",
        "an eraser that refuses lets the image through",
        (
            Text(
                _RUNTIME,
                "    def _raise_refused(self, call: ErasureCall) -> None:\n",
                "    def _raise_refused(self, call: ErasureCall) -> None:\n        return\n",
            ),
        ),
        ("tests/eraser/test_eraser_actions.py::test_refused_before_an_image_is_returned",),
    ),
    Mutation(
        "opens-from-nothing",
        "a gate opens from the least evidence on, below its lower bound",
        (Text(_BATCHED, "torch.stack([g.low, g.high - g.low], 1)", "torch.stack([0 * g.low, g.high], 1)"),),
        ("tests/eraser/test_eraser_stacked.py::test_gates_together",),
    ),
    Mutation(
        "feature-threshold",
        "features fire below their own thresholds",
        (Text(_BATCHED, "z = pre * (pre > self.threshold.to(pre))", "z = pre * (pre > 0)"),),
        ("tests/eraser/test_eraser_stacked.py::test_gates_together",),
    ),
    Mutation(
        "time-bin",
        "every timestep is looked up as the first",
        (
            Text(
                "src/neuraleraser/eraser/gate.py",
                "    return torch.bucketize(timestep.contiguous(), bin_edges(times).to(timestep.device))\n",
                "    return torch.bucketize(timestep.contiguous(), bin_edges(times).to(timestep.device)) * 0\n",
            ),
        ),
        ("tests/test_eraser.py::test_the_nearest_time",),
    ),
    Mutation(
        "before-its-gate",
        "an edit that ran before its gate is no error",
        (
            Text(
                _RUNTIME,
                "            if i not in forward.scales and i not in forward.closed:\n",
                "            if False:\n",
            ),
        ),
        ("tests/test_eraser.py::test_an_edit_before_its_gate",),
    ),
    Mutation(
        "branches-swapped",
        "the negative prompt's rows are taken for the prompt's",
        (Text("src/neuraleraser/sites/rows.py", "            if not negative:\n", "            if negative:\n"),),
        ("tests/fit/test_fit_edits.py::test_states_are_the_conditional_half_of_every_step",),
    ),
    Mutation(
        "one-seed",
        "all images of a batch start from the first one's noise",
        (Text(_SAMPLING, "int(seeds[i])", "int(seeds[0])"),),
        ("tests/test_sampling.py::test_order_neighbours_and_padding_do_not_matter",),
    ),
    Mutation(
        "canvas-sampling",
        "any pipeline is sampled as the canvas where nothing else is said",
        (Text(_SAMPLING, "sampling or default_sampling(pipe)", "sampling or Sampling()"),),
        ("tests/fit/test_fit_sampling.py",),
    ),
    Mutation(
        "shuffled-denoiser",
        "the shipped denoiser's weights are shuffled within each tensor",
        shuffle_denoiser,
        (f"{PRODUCT}::test_the_model_draws_what_is_asked",),
    ),
    Mutation(
        "rolled-rows",
        "each labelled feature of the shipped dictionary has the next one's rows",
        roll_labelled_rows,
        (f"{PRODUCT}::test_the_shipped_rows_are_what_the_model_and_the_sae_say",),
    ),
    Mutation(
        "rolled-judge",
        "the second judge takes each class for the next",
        roll_judge_classes,
        ("tests/judges/test_judges_canvas.py::test_it_names_what_fresh_renders_show",),
    ),
)


def copy(tree: Path) -> None:
    """Copy what tests need of the project to `tree`; weights are linked, file by file."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "weights", ".hypothesis")
            shutil.copytree(source, tree / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, tree / name)
    for path in (ROOT / WEIGHTS).rglob("*"):
        if path.is_file():
            link = tree / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def run(tree: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Run tests in a tree -> ("green", "red" or "broken", the line that says which test failed).

    Broken is what says nothing of the product: tests that cannot be collected, none at all, or no end.
    """
    paths = os.pathsep.join(str(tree / name) for name in ("src", "tests"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "broken", f"no end within {LIMIT} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = lines[0] if lines else done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    return {0: "green", 1: "red"}.get(done.returncode, "broken"), said.split(" - ")[0].removeprefix("FAILED ")


def attempt(mutation: Mutation, whole: bool) -> tuple[str, str]:
    """Make one mutation in a copy of its own -> ("killed", "survived" or "broken", by which test)."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder)
        copy(tree)
        apply(mutation, tree)
        result, said = run(tree, mutation.tests)
        if result == "green" and whole:
            result, said = run(tree, ["tests"])
    return {"red": "killed", "green": "survived"}.get(result, result), said


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutations and print a table; return 1 if one survives or says nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="mutations to try; none: all")
    parser.add_argument("--list", action="store_true", help="print the mutations, and try none")
    parser.add_argument("--whole", action="store_true", help="run the whole suite where the named tests stay green")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - {m.name for m in MUTATIONS}:
        parser.error(f"there is no mutation {sorted(unknown)[0]!r}: --list says which there are")
    chosen = [m for m in MUTATIONS if not given.names or m.name in given.names]
    if given.list:
        for m in chosen:
            print(f"{m.name:26}{m.what}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy(Path(folder))
        result, said = run(Path(folder), list(dict.fromkeys(test for m in chosen for test in m.tests)))
    if result != "green":
        print(f"without any mutation the tests are {result}: {said}")
        return 1
    bad = 0
    for m in chosen:
        started = time.monotonic()
        try:
            result, said = attempt(m, given.whole)
        except Stale as error:
            result, said = "stale", str(error)
        bad += result != "killed"
        print(
            f"{m.name:26}{result:10}{time.monotonic() - started:6.0f} s  {said if result != 'survived' else m.what}",
            flush=True,
        )
    print(f"{len(chosen) - bad} of {len(chosen)} killed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
