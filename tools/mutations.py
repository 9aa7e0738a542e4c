"""The mutations that `mutate.py` makes: what is broken, and which tests must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path("src/neuraleraser/canvas/weights")
PRODUCT = "tests/canvas/test_product.py"
FIT = "tests/fitting/test_fit.py"


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

    path = tree / WEIGHTS / "reference" / "sae.safetensors"
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


_FITTING = "src/neuraleraser/fitting/fit.py"
_GATE = "src/neuraleraser/fitting/detector.py"
_RUNTIME = "src/neuraleraser/eraser/runtime.py"
_SITE_EDIT = "src/neuraleraser/eraser/site_edit.py"
_BATCHED = "src/neuraleraser/eraser/batched.py"
_LAYOUT = "src/neuraleraser/sites/layout.py"
_SAMPLING = "src/neuraleraser/sampling.py"
_METRICS = "src/neuraleraser/evaluation/metrics.py"
_CELLS = "src/neuraleraser/evaluation/vocabulary_cells.py"
_ROWS = "src/neuraleraser/sites/rows.py"
_TEXT = "src/neuraleraser/fitting/text_correction.py"
_DECISIONS = "src/neuraleraser/eraser/decisions.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "targets",
        "the text moves away from that without the concept",
        (Text(_TEXT, "(wanted - shown).flatten(0, 1), rank)", "(shown - wanted).flatten(0, 1), rank)"),),
        ("tests/fitting/test_text_correction.py", PRODUCT),
    ),
    Mutation(
        "unaligned",
        "tokens are matched by their number, wherever the words stand",
        (
            Text(
                _TEXT, "    return y.gather(1, align(x, y).unsqueeze(2).expand(-1, -1, y.shape[2]))\n", "    return y\n"
            ),
        ),
        ("tests/fitting/test_text_correction.py::test_tokens_are_matched_as_they_are_aligned",),
    ),
    Mutation(
        "held-on",
        "what was decided of one text stands for another",
        (Text(_DECISIONS, "{part: opening * same.to(opening) for", "{part: opening for"),),
        ("tests/eraser/test_holding.py::test_a_new_text_is_decided_anew",),
    ),
    Mutation(
        "not-again",
        "the step in which a gate opens is not taken again",
        (Text(_RUNTIME, "            if again is not None:\n", "            if again is not None and False:\n"),),
        ("tests/eraser/test_holding.py::test_erasers_of_two_attachments_act_together",),
    ),
    Mutation(
        "others-left-out",
        "in a step that is taken again other attachments do not act",
        (
            Text(
                "src/neuraleraser/sites/forwards.py",
                "if hooks is self or (hooks.active and hooks.guard.repeats)]",
                "if hooks is self]",
            ),
        ),
        ("tests/eraser/test_holding.py::test_an_edit_beside_it_acts_in_the_step_that_is_taken_again",),
    ),
    Mutation(
        "negatives",
        "rows that show the concept count as background",
        (
            Text(
                _FITTING,
                "    lacks = reference.pooled[rows_without(concept, reference.prompts, reference.labels)]\n",
                "    lacks = reference.pooled\n",
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
                "[p.positive for p in pairs], seeds, coarse)",
                "[p.positive for p in pairs], [seed + 500 for seed in seeds], coarse)",
            ),
        ),
        (f"{FIT}::test_a_pair_is_drawn_from_the_same_noise",),
    ),
    Mutation(
        "own-matches",
        "the concept's matched prompts are no background of its gate",
        (Text(_FITTING, "torch.cat([lacks, plain_rows, *hard])", "torch.cat([lacks, *hard])"),),
        (f"{FIT}::test_the_concept_s_matched_prompts_are_background",),
    ),
    Mutation(
        "reference",
        "an eraser's header does not say what its reference was made with",
        (Text(_FITTING, "        reference=reference.provenance.in_short(),\n", ""),),
        (f"{FIT}::test_the_whole_fit",),
    ),
    Mutation(
        "matches-said",
        "an eraser's header leaves out the matched prompts it was made with",
        (
            Text(
                "src/neuraleraser/fitting/prompt_correction.py",
                "tuple(read.texts), seeds)",
                "tuple(pair.positive for pair in pairs), seeds)",
            ),
        ),
        (f"{FIT}::test_the_whole_fit",),
    ),
    Mutation(
        "any-reference",
        "the canvas's reference is taken for any pipeline",
        (
            Text(
                "src/neuraleraser/fitting/reference.py",
                "    folder = family_of(pipe).reference\n",
                "    folder = family_of(pipe).reference or FAMILIES[0].reference\n",
            ),
            Text(
                "src/neuraleraser/fitting/reference.py",
                "from neuraleraser.families import family_of\n",
                "from neuraleraser.families import FAMILIES, family_of\n",
            ),
        ),
        (f"{FIT}::test_no_reference_is_taken_for_another_pipeline_s",),
    ),
    Mutation(
        "width",
        "a reference of another width is not refused",
        (Text(_FITTING, "    if width != reference.sae.d_in:\n", "    if False:\n"),),
        (f"{FIT}::test_no_reference_is_taken_for_another_pipeline_s",),
    ),
    Mutation(
        "lower-bound",
        "a gate's lower bound lies below half of the background",
        (Text(_GATE, "lacks.quantile(1 - false_openings, 0, interpolation", "lacks.quantile(0.4, 0, interpolation"),),
        ("tests/fitting/test_detector.py::test_bounds_part_what_is_apart",),
    ),
    Mutation(
        "decoder-bias",
        "a gate's features leave out the SAE's decoder bias",
        (Text(_GATE, "bias=(sae.b_enc[f].float() - rows @ sae.b_dec.float()),", "bias=sae.b_enc[f].float().clone(),"),),
        ("tests/fitting/test_detector.py::test_the_gate_weighs_the_sae_s_own_features",),
    ),
    Mutation(
        "bins-reversed",
        "a gate's bounds belong to the other end of sampling",
        (Text(_GATE, "        low=low[order].clone(),\n", "        low=low.clone(),\n"),),
        ("tests/fitting/test_detector.py::test_the_gate_weighs_the_sae_s_own_features",),
    ),
    Mutation(
        "speaks-against",
        "what a neighbour alone has does not speak against the concept",
        (
            Text(
                _GATE,
                "    weight = logistic_weights(on[..., features], off[..., features])\n",
                "    weight = logistic_weights(on[..., features], off[..., features]).abs()\n",
            ),
        ),
        ("tests/fitting/test_detector.py::test_what_only_neighbours_have_speaks_against",),
    ),
    Mutation(
        "labels-ignored",
        "labels of a reference's rows say nothing of what they show",
        (Text("src/neuraleraser/fitting/background.py", "    if any(named):\n", "    if False:\n"),),
        ("tests/fitting/test_background.py",),
    ),
    Mutation(
        "imported-labels",
        "an imported reference drops what its prompts show",
        (Text("src/neuraleraser/fitting/import_reference.py", "zip(prompts, labels or [()]", "zip(prompts, [()]"),),
        ("tests/fitting/test_import_reference.py::test_what_shows_the_concept_is_no_background_for_it",),
    ),
    Mutation(
        "calibrated-as-the-canvas",
        "an eraser is calibrated as the canvas is sampled, however it was fitted",
        (
            Text(
                "src/neuraleraser/fitting/calibrate.py",
                "    usual = sampling_for_eraser(pipe, eraser.header.sampling)\n",
                "    usual = Sampling()\n",
            ),
        ),
        ("tests/test_default_sampling.py",),
    ),
    Mutation(
        "exact-class",
        "a block whose class inherits from a known one is not known",
        (Text("src/neuraleraser/sites/modules.py", "type(module).__mro__)", "type(module).__mro__[:1])"),),
        ("tests/families/test_family.py::test_a_family_makes_them_known",),
    ),
    Mutation(
        "wrapped-family",
        "a compiled transformer is of no family",
        (Text("src/neuraleraser/families/family.py", 'getattr(transformer, "_orig_mod", transformer)', "transformer"),),
        ("tests/families/test_family.py::test_a_compiled_denoiser_is_of_its_family",),
    ),
    Mutation(
        "object-site",
        "an object of SDXL is looked for where style lies",
        (
            Text(
                "src/neuraleraser/families/sdxl.py",
                'Site("unet.down_blocks.2.attentions.1", "update"), "object", "composition"',
                'Site("unet.down_blocks.2.attentions.1", "update"), "", "composition"',
            ),
            Text(
                "src/neuraleraser/families/sdxl.py",
                'Site("unet.up_blocks.0.attentions.1", "update"), "style", "colour',
                'Site("unet.up_blocks.0.attentions.1", "update"), "any", "colour',
            ),
        ),
        ("tests/families/test_families.py::test_each_kind_is_looked_for_where_it_was_found",),
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
        ("tests/eraser/test_attach.py::test_strength_scales_the_edit",),
    ),
    Mutation(
        "strength",
        "an eraser acts in full, whatever its strength",
        (Text(_RUNTIME, "        return own * opening\n", "        return opening\n"),),
        ("tests/eraser/test_attach.py::test_strength_scales_the_edit",),
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
        ("tests/eraser/test_actions.py::test_refused_before_an_image_is_returned",),
    ),
    Mutation(
        "opens-from-nothing",
        "a gate opens from the least evidence on, below its lower bound",
        (Text(_BATCHED, "torch.stack([g.low, g.high - g.low], 1)", "torch.stack([0 * g.low, g.high], 1)"),),
        ("tests/eraser/test_batched.py::test_gates_together",),
    ),
    Mutation(
        "feature-threshold",
        "features fire below their own thresholds",
        (Text(_BATCHED, "top * (top > threshold)", "top * (top > 0)"),),
        ("tests/eraser/test_batched.py::test_gates_together",),
    ),
    Mutation(
        "one-shut-all-shut",
        "where one gate cannot open, those beside it are not read",
        (Text(_SITE_EDIT, "min(lows) >= SHUT_BOUND", "max(lows) >= SHUT_BOUND"),),
        ("tests/eraser/test_shut_gates.py::test_beside_one_that_may_open_it_is_read",),
    ),
    Mutation(
        "unseen-infinity",
        "-inf among a gate's pre-activations passes unseen",
        (Text(_BATCHED, " + 0 * pre.sum(1)", ""),),
        ("tests/eraser/test_batched.py::test_what_is_not_finite_shows_in_the_evidence",),
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
        ("tests/eraser/test_arithmetic.py::test_the_nearest_time",),
    ),
    Mutation(
        "before-its-gate",
        "an edit that ran before its gate is no error",
        (
            Text(
                _SITE_EDIT,
                "            if i not in forward.scales and i not in forward.closed:\n",
                "            if False:\n",
            ),
        ),
        ("tests/eraser/test_attach.py::test_an_edit_before_its_gate",),
    ),
    Mutation(
        "branches-swapped",
        "the negative prompt's rows are taken for the prompt's",
        (Text("src/neuraleraser/sites/rows.py", "            if not negative:\n", "            if negative:\n"),),
        ("tests/activations/test_loss_recovered.py",),
    ),
    Mutation(
        "one-seed",
        "all images of a batch start from the first one's noise",
        (Text(_SAMPLING, "int(seeds[i])", "int(seeds[0])"),),
        ("tests/test_sampling.py::test_order_neighbours_and_padding_do_not_matter",),
    ),
    Mutation(
        "one-latent",
        "all images of a batch start from the first one's latents",
        (Text(_SAMPLING, "latents[index]", "latents[index[:1] * size]"),),
        ("tests/test_sampling.py::test_latents_stand_in_for_the_seed",),
    ),
    Mutation(
        "inversion-once",
        "a step backwards is not solved but guessed",
        (Text("src/neuraleraser/attacks/inverted_latents.py", "_REPEATS = 2", "_REPEATS = 1"),),
        ("tests/attacks/test_inverted_latents.py::test_latents_that_are_drawn_from_are_the_picture_s",),
    ),
    Mutation(
        "no-word",
        "what was learned does not stand in the prompts while they are drawn",
        (
            Text(
                "src/neuraleraser/evaluation/draw.py",
                "learned_word(using, self._embeddings(call.learned))",
                "learned_word(using, 0 * self._embeddings(call.learned))",
            ),
        ),
        ("tests/evaluation/test_learned_words.py::test_cells_are_drawn_with_embeddings_learned_on_renders",),
    ),
    Mutation(
        "canvas-sampling",
        "any pipeline is sampled as the canvas where nothing else is said",
        (Text(_SAMPLING, "sampling or default_sampling(pipe)", "sampling or Sampling()"),),
        ("tests/test_default_sampling.py",),
    ),
    Mutation(
        "judge-thresholds",
        "whatever a class's own threshold is, an image shows it above one half",
        (Text(_METRICS, "[results.judge.thresholds[name] for name in names]", "[0.5 for _ in names]"),),
        (
            "tests/evaluation/test_metrics.py::test_thresholds_are_the_judge_s_by_class",
            "tests/evaluation/test_evaluate.py::test_every_thing_a_judge_says_is_read_by_its_own_thresholds",
        ),
    ),
    Mutation(
        "artefact-limit",
        "no distance is an artefact",
        (Text(_METRICS, "proportion(results.artefact > limit,", 'proportion(results.artefact > float("inf"),'),),
        ("tests/evaluation/test_metrics.py::test_artefact_rate_is_the_share_beyond_the_judge_s_threshold",),
    ),
    Mutation(
        "first-judge",
        "erasers are measured by the judge that may choose, not by the second",
        (
            Text(
                "src/neuraleraser/families/canvas.py",
                'return CanvasJudge.load("second")',
                'return CanvasJudge.load("first")',
            ),
        ),
        ("tests/evaluation/test_evaluate.py::test_the_default_judge_is_the_second_of_the_canvas",),
    ),
    Mutation(
        "grey-start",
        "image-to-image starts from grey instead of the render",
        (
            Text(
                _CELLS,
                "np.stack([render(start.objects, start.style, start.seed, size) for start in starts])",
                "np.stack([0 * render(start.objects, start.style, start.seed, size) + 127 for start in starts])",
            ),
        ),
        ("tests/evaluation/test_evaluate.py::test_image_to_image_starts_from_the_render",),
    ),
    Mutation(
        "certain",
        "where all images agree the interval has no width",
        (
            Text(
                "src/neuraleraser/evaluation/intervals.py",
                "value, slack = count / out_of, unanimous_bound(n) * n / out_of",
                "value, slack = count / out_of, 0.0",
            ),
        ),
        ("tests/evaluation/test_intervals.py::test_all_or_none_has_the_exact_binomial_interval",),
    ),
    Mutation(
        "filter-knows-all",
        "the filter that knows the training phrasings knows the held-out ones, too",
        (
            Text(
                "src/neuraleraser/methods/string_filter.py",
                '("string-filter-seen", PHRASINGS[SEEN])',
                '("string-filter-seen", PHRASINGS)',
            ),
        ),
        ("tests/methods/test_string_filter.py::test_what_it_must_reach_on_the_benchmark",),
    ),
    Mutation(
        "reference-prompts",
        "the prompts of a reference may test its erasers",
        (
            Text(
                "src/neuraleraser/evaluation/split.py",
                " or hashlib.sha256(cell.prompt.encode()).hexdigest()[:8] in made.prompt_digests",
                "",
            ),
        ),
        ("tests/evaluation/test_protocol.py",),
    ),
    Mutation(
        "sealed",
        "sealed concepts are measured whenever one asks",
        (Text(_CELLS, "    if closed:\n", "    if False:\n"),),
        ("tests/evaluation/test_protocol.py::test_a_sealed_concept_has_no_cells_but_on_purpose",),
    ),
    Mutation(
        "not-compared",
        "images that are said to have the same bits are not compared",
        (
            Text(
                "src/neuraleraser/evaluation/draw.py",
                '[np.array_equal(x, run.image(BASE, "", c)) for c, x in',
                "[True for c, x in",
            ),
        ),
        ("tests/evaluation/test_evaluate.py::test_a_method_that_acts_where_it_says_that_it_does_not_is_found_out",),
    ),
    Mutation(
        "negative-fires",
        "a concept in the negative prompt is taken for one that is drawn",
        (
            Text(
                _ROWS,
                "tuple(not (is_negative and pushes_away) for is_negative in negative)",
                "tuple(True for _ in negative)",
            ),
        ),
        (
            "tests/sites/test_rows.py",
            "tests/eraser/test_branches_and_frames.py::test_a_concept_in_the_negative_prompt_is_not_asked_for",
        ),
    ),
    Mutation(
        "negative-never-counts",
        "the negative prompt never counts, though without guidance it is the one that is drawn",
        (Text(_ROWS, "said.guidance is not None and said.guidance > 1", "True"),),
        (
            "tests/eraser/test_branches_and_frames.py::test_while_guidance_does_not_push_away_the_negative_prompt_counts",
        ),
    ),
    Mutation(
        "read-at-once",
        "prompts longer than the text encoder reads are read at once",
        (
            Text(
                _SITE_EDIT,
                "context.text_tokens is not None and context.text_tokens > tokens",
                "context.text_tokens is not None and context.text_tokens < 0",
            ),
        ),
        ("tests/eraser/test_long_prompts.py::test_a_concept_in_any_chunk_is_seen",),
    ),
    Mutation(
        "shared-call",
        "threads share what is known of a call",
        (
            Text(
                "src/neuraleraser/sites/threads.py",
                "        self.local = threading.local()\n",
                '        self.local = type("Local", (), {})()\n',
            ),
        ),
        ("tests/eraser/test_shared_denoiser.py::test_threads_draw_as_if_alone",),
    ),
    Mutation(
        "decoded-anyway",
        "latents become pictures, whatever the call did",
        (
            Text(
                "src/neuraleraser/sites/guard.py",
                "            self.observer.on_decode(thread.state)\n",
                "            pass\n",
            ),
        ),
        ("tests/eraser/test_boundary.py::test_a_refused_picture_is_never_seen",),
    ),
    Mutation(
        "decoded-nan",
        "latents of NaN become pictures, where the last forward had none",
        (
            Text(
                "src/neuraleraser/sites/guard.py",
                "        if any(isinstance(x, Tensor) and not bool(x.isfinite().all()) for x in args):",
                "        if False:",
            ),
        ),
        ("tests/eraser/test_start_images.py::test_nan_in_a_picture_or_a_mask_is_no_image",),
    ),
    Mutation(
        "any-start",
        "start images and masks of any kind are drawn from",
        (Text(_SAMPLING, "    _check_start(pipe, image, mask_image)\n", ""),),
        ("tests/test_sampling.py::test_what_is_no_start_image",),
    ),
    Mutation(
        "replaced-module",
        "a denoiser that was replaced is not noticed",
        (
            Text(
                "src/neuraleraser/sites/guard.py",
                "            if module is None or not _has_hooks(unwrap(module), hooks):\n",
                "            if False:\n",
            ),
        ),
        ("tests/eraser/test_boundary.py::test_a_replaced_denoiser_is_noticed_by_whatever_runs_next",),
    ),
    Mutation(
        "frames",
        "each frame of a video is an image",
        (
            Text(
                _ROWS,
                "return [image for _ in self.counts for image in range(self.images) for _ in range(each)]",
                "return [image for _ in self.counts for image in range(self.images * each)]",
            ),
        ),
        ("tests/sites/test_rows.py", "tests/eraser/test_branches_and_frames.py::test_frames_of_a_video_are_one_image"),
    ),
    Mutation(
        "first-strength",
        "strengths by image are those of the first image",
        (
            Text(
                _RUNTIME,
                "            own = own[torch.tensor(rows.image_of(len(opening)), device=own.device)]\n",
                "            own = own[torch.zeros(len(opening), dtype=torch.long, device=own.device)]\n",
            ),
        ),
        ("tests/eraser/test_shared_denoiser.py::test_strengths_by_image_hold_in_a_twin",),
    ),
    Mutation(
        "unseen-route",
        "a start image that no gate sees is not said",
        (Text(_RUNTIME, "        if not call.routes <= self.named_routes:\n", "        if False:\n"),),
        ("tests/eraser/test_routes.py::test_each_route_is_named_once",),
    ),
    Mutation(
        "scaling-sign",
        "features are scaled with the sign turned round",
        (
            Text(
                "src/neuraleraser/eraser/corrections/scaling.py",
                "        return z * (factor.to(z) - 1)\n",
                "        return z * (1 - factor.to(z))\n",
            ),
        ),
        ("tests/fitting/test_fit_saeuron.py::test_blocking_is_the_formula_and_never_the_sae_s_error",),
    ),
    Mutation(
        "published-sign",
        "SAeUron's published form has its error term put right",
        (Text("src/neuraleraser/methods/saeuron.py", "(ablated + (recon - x)) - x", "(ablated + (x - recon)) - x"),),
        ("tests/methods/test_saeuron.py::test_where_nothing_is_blocked_the_error_counts_twice",),
    ),
    Mutation(
        "published-time",
        "SAeUron's published form reads the timestep instead of counting calls",
        (
            Text(
                "src/neuraleraser/methods/saeuron.py",
                "            step, calls = descending[calls], calls + 1\n",
                "            step = int((table.times - float(context.timestep[0])).abs().argmin())\n",
            ),
        ),
        ("tests/methods/test_saeuron.py::test_calls_are_counted_and_timesteps_are_not_read",),
    ),
    Mutation(
        "image-gates",
        "a gate in the image stream leaves the negative prompt's rows alone",
        (Text(_SITE_EDIT, "torch.maximum(mask, self.plan.pictures.to(mask))", "mask"),),
        ("tests/fitting/test_fit_saeuron.py::test_an_image_gate_sees_both_guidance_branches",),
    ),
    Mutation(
        "sealed-drawn",
        "SAeUron's features are scored on prompts that name sealed concepts",
        (
            Text(
                "src/neuraleraser/fitting/fit_saeuron.py",
                "    if vocabulary is None:\n        return prompts\n",
                "    if True:\n        return prompts\n",
            ),
        ),
        ("tests/fitting/test_fit_saeuron.py::test_what_is_sealed_is_not_drawn",),
    ),
    Mutation(
        "turned-windows",
        "windows are read from right to left",
        (
            Text(
                "src/neuraleraser/eraser/gate.py",
                "rows.to(x).view(len(rows), -1, window, window)",
                "rows.to(x).view(len(rows), -1, window, window).flip(3)",
            ),
        ),
        ("tests/eraser/test_windows.py::test_a_window_is_the_sum_over_neighbours",),
    ),
    Mutation(
        "window-in-a-corner",
        "beside a wider gate a narrow window lies in its corner",
        (Text(_BATCHED, "[(window - gate.window) // 2] * 4", "[0, window - gate.window] * 2"),),
        ("tests/eraser/test_windows.py::test_gates_of_several_windows_together",),
    ),
    Mutation(
        "any-grid",
        "a window takes any grid",
        (
            Text(
                "src/neuraleraser/eraser/gate.py",
                "if grid is None or grid[0] * grid[1] != x.shape[1]:",
                "if grid is None:",
            ),
        ),
        ("tests/eraser/test_windows.py::test_a_window_without_its_grid_is_an_error",),
    ),
    Mutation(
        "grid-rounded-down",
        "deeper blocks hold half of each side, rounded down",
        (
            Text(
                "src/neuraleraser/sites/hooks.py",
                "height, width = (height + 1) // 2, (width + 1) // 2",
                "height, width = height // 2, width // 2",
            ),
        ),
        ("tests/eraser/test_windows.py::test_the_grid_at_every_depth_of_a_unet",),
    ),
    Mutation(
        "turned-grid",
        "latents are taken to be as wide as they are high",
        (
            Text(
                "src/neuraleraser/sites/forwards.py",
                "return latents.shape[-2] // height, latents.shape[-1] // width",
                "return latents.shape[-1] // height, latents.shape[-2] // width",
            ),
        ),
        ("tests/eraser/test_windows.py::test_the_grid_of_a_transformer_is_that_of_its_patches",),
    ),
    Mutation(
        "window-forgotten",
        "an eraser's file says that its image gate reads one position",
        (Text("src/neuraleraser/eraser/eraser.py", '"window": self.image_gate.window,', '"window": 1,'),),
        ("tests/eraser/test_windows.py::test_window_and_picture_survive_the_file",),
    ),
    Mutation(
        "any-window",
        "a file's window may be anything that looks like a number",
        (Text("src/neuraleraser/eraser/eraser.py", "    if not is_whole(window):\n", "    if False:\n"),),
        ("tests/eraser/test_windows.py::test_windows_that_cannot_be",),
    ),
    Mutation(
        "not-held",
        "an image that was open is left alone where the gate is shut again",
        (Text(_RUNTIME, "if part in call.held else []", "if part in call.held and scale is not None else []"),),
        ("tests/eraser/test_guided.py::test_once_open_an_image_stays_open_for_the_rest_of_its_call",),
    ),
    Mutation(
        "held-for-ever",
        "an image that was open stays open in the next call",
        (
            Text(
                _RUNTIME,
                "    held: dict[int, Tensor] = field(default_factory=dict)\n",
                "    held: dict[int, Tensor] = field(default_factory=lambda kept={}: kept)\n",
            ),
        ),
        ("tests/eraser/test_guided.py::test_once_open_an_image_stays_open_for_the_rest_of_its_call",),
    ),
    Mutation(
        "each-pass",
        "the second pass of a step is moved by what the gate sees in it",
        (Text(_RUNTIME, "if call.step is None or not call.step.is_of(finished.call):", "if True:"),),
        ("tests/eraser/test_guided.py::test_the_second_pass_of_a_step_repeats_the_first_s_change",),
    ),
    Mutation(
        "prompt-gate-alone",
        "a report shows the prompt gate alone",
        (
            Text(
                "src/neuraleraser/methods/gate_panels.py", "for part in eraser.parts]", "for part in eraser.parts[:1]]"
            ),
        ),
        ("tests/methods/test_gate_panels.py::test_a_panel_for_every_gate",),
    ),
    Mutation(
        "weakest-images",
        "a feature is shown where it fires least",
        (
            Text(
                "src/neuraleraser/methods/gate_panels.py",
                "best = strength.argsort(descending=True)",
                "best = strength.argsort(descending=False)",
            ),
        ),
        ("tests/methods/test_gate_panels.py::test_a_feature_is_shown_where_it_fires_most",),
    ),
    Mutation(
        "unsaid-routes",
        "routes that an eraser does not see are not said",
        (Text("src/neuraleraser/eraser/sight.py", "    if unseen:\n", "    if False:\n"),),
        ("tests/eraser/test_sight.py::test_every_route_is_either_seen_or_not",),
    ),
    Mutation(
        "levels-turned",
        "levels of noise are named the wrong way round",
        (Text("src/neuraleraser/eraser/sight.py", "gate.times.flip(0).tolist()", "gate.times.tolist()"),),
        ("tests/eraser/test_sight.py::test_levels_of_noise_go_from_the_noisiest",),
    ),
    Mutation(
        "calibrated-routes",
        "calibrated without its image gate an eraser claims to see start images",
        (
            Text(
                "src/neuraleraser/fitting/calibrate.py",
                "if eraser.image_gate is None or route in PROMPT_ROUTES",
                "if True",
            ),
        ),
        ("tests/fitting/test_calibrate.py::test_an_image_gate_is_left_out_and_the_header_says_so",),
    ),
    Mutation(
        "start-images-unsaid",
        "the doctor does not say that it draws no start image",
        (Text("src/neuraleraser/diagnosis.py", "    if eraser.image_gate is not None:\n", "    if False:\n"),),
        ("tests/test_doctor.py::test_start_images_are_not_looked_at",),
    ),
    Mutation(
        "blind-start",
        "start images are not looked at before they are drawn",
        (Text("src/neuraleraser/eraser/runtime.py", "self.plan.first_look and call.call.start is not None", "False"),),
        ("tests/eraser/test_first_look.py::test_what_it_sees_there_opens_the_gate_from_the_first_step_on",),
    ),
    Mutation(
        "looked-without-scale",
        "a start image is shown to the gates in other units than the denoiser's",
        (Text("src/neuraleraser/sites/start_images.py", ".mul(scale)", ""),),
        ("tests/eraser/test_first_look.py::test_a_call_knows_its_start_images_without_noise",),
    ),
    Mutation(
        "full-push",
        "a guided correction pushes on in full where its gate is shut again",
        (Text("src/neuraleraser/eraser/runtime.py", "low = held * HELD", "low = held"),),
        ("tests/eraser/test_guided.py::test_once_open_an_image_stays_open_for_the_rest_of_its_call",),
    ),
    Mutation(
        "shuffled-denoiser",
        "the shipped denoiser's weights are shuffled within each tensor",
        shuffle_denoiser,
        (f"{PRODUCT}::test_the_model_draws_what_is_asked",),
    ),
    Mutation(
        "rolled-rows",
        "each labelled feature of the shipped reference has the next one's rows",
        roll_labelled_rows,
        (f"{PRODUCT}::test_the_shipped_rows_are_what_the_model_and_the_sae_say",),
    ),
    Mutation(
        "rolled-judge",
        "the second judge takes each class for the next",
        roll_judge_classes,
        ("tests/judges/test_canvas_judge.py::test_it_names_what_fresh_renders_show",),
    ),
    Mutation(
        "prediction-without-sites",
        "an attachment without sites changes no prediction",
        (
            Text(
                "src/neuraleraser/sites/forwards.py",
                "        if self.timestep_index is None or rows is None:\n",
                "        if self.timestep_index is None or rows is None or not self.sites:\n",
            ),
        ),
        ("tests/sites/test_prediction.py::test_the_change_is_added_in_every_family",),
    ),
    Mutation(
        "second-pass",
        "of two passes with one text both are taken for the conditional one",
        (
            Text(
                "src/neuraleraser/methods/conditional.py",
                "if not blocks or (self.step is not None and self.step.is_of(call)):",
                "if not blocks:",
            ),
        ),
        ("tests/methods/test_conditional.py::test_guidance_in_one_batch_and_in_two_passes",),
    ),
    Mutation(
        "judge-not-read",
        "a judge that cannot read the base model's images is taken",
        (Text("src/neuraleraser/evaluation/base_check.py", "READABLE = 0.5", "READABLE = 0.0"),),
        ("tests/evaluation/test_base_check.py::test_a_shuffled_judge_is_refused_before_a_method_is_drawn",),
    ),
    Mutation(
        "oracle-asks",
        "the oracle asks for the concept",
        (
            Text(
                "src/neuraleraser/methods/oracle.py",
                "objects = tuple(name for name in cell.objects if name != concept)",
                "objects = tuple(cell.objects)",
            ),
        ),
        ("tests/methods/test_oracle.py::test_no_prompt_that_stands_instead_names_the_concept",),
    ),
    Mutation(
        "attack-one-drawing",
        "all steps of an attack are one drawing",
        (
            Text(
                "src/neuraleraser/attacks/denoising.py",
                "        scheduler.set_timesteps(last)  #",
                "        #",
            ),
        ),
        ("tests/attacks/test_learned_embeddings.py::test_every_step_is_a_drawing_of_its_own",),
    ),
    Mutation(
        "attack-weights",
        "an attack makes gradients for the model's weights",
        (
            Text(
                "src/neuraleraser/attacks/denoising.py",
                "            stack.enter_context(frozen(pipe))\n",
                "",
            ),
        ),
        ("tests/attacks/test_learned_embeddings.py::test_nothing_stays_behind",),
    ),
    Mutation(
        "attack-not-blinded",
        "an attack forgets the gates that it knows",
        (
            Text(
                "src/neuraleraser/attacks/learned_embeddings.py",
                "loss = loss + blinding * torch.stack(evidence).mean()",
                "loss = loss + 0 * torch.stack(evidence).mean()",
            ),
        ),
        ("tests/attacks/test_learned_embeddings.py::test_gates_are_blinded",),
    ),
    Mutation(
        "learned-first",
        "all learned embeddings are the first",
        (
            Text(
                "src/neuraleraser/attacks/learned_embeddings.py",
                "(ids == first + k)[..., None], vector.to",
                "(ids == first + k)[..., None], vectors[0].to",
            ),
        ),
        ("tests/attacks/test_learned_embeddings.py::test_embeddings_stand_where_the_word_does",),
    ),
    Mutation(
        "shut-levels",
        "levels that cannot tell raise the bounds of those that can",
        (
            Text(
                "src/neuraleraser/fitting/image_gate.py",
                "standing_out[:, ~shut].amax(1)",
                "standing_out.amax(1)",
            ),
        ),
        ("tests/fitting/test_image_gate.py::test_a_level_that_cannot_tell_is_shut_and_asks_nothing_of_the_others",),
    ),
    Mutation(
        "second-pass-alone",
        "what the second pass of guidance alone sees is never acted on",
        (
            Text(
                "src/neuraleraser/eraser/runtime.py",
                "else:  # what a second pass sees",
                "elif False:  # what a second pass sees",
            ),
        ),
        ("tests/eraser/test_guided.py::test_what_the_second_pass_alone_sees_acts_from_the_next_step_on",),
    ),
    Mutation(
        "claimed-routes",
        "a file may claim routes that no gate of its sees, which silences the warning",
        (Text("src/neuraleraser/eraser/eraser.py", "if pictures and not any(", "if False and not any("),),
        ("tests/eraser/test_routes.py::test_a_file_says_which_routes_its_gate_sees",),
    ),
    Mutation(
        "corrected-images",
        "an image gate may open at what it reads of a prompt that is corrected",
        (Text("src/neuraleraser/fitting/image_gate.py", "    if corrected is not None:\n", "    if False:\n"),),
        (
            "tests/fitting/test_image_gate.py"
            "::test_a_corrected_image_keeps_the_gate_shut_and_one_that_is_not_does_not_count",
        ),
    ),
    Mutation(
        "least-mistaken",
        "an image gate learns from those pictures that it would not mistake",
        (
            Text(
                "src/neuraleraser/fitting/learnt_features.py",
                ".amax(1).topk(count).indices",
                ".amax(1).neg().topk(count).indices",
            ),
        ),
        ("tests/fitting/test_image_gate.py::test_what_is_mistaken_most_is_learnt_from_too",),
    ),
    Mutation(
        "level-turns",
        "pictures that take turns are given back in the order of their turns",
        (
            Text(
                "src/neuraleraser/fitting/noised_pictures.py",
                "back = torch.tensor(order).argsort()",
                "back = torch.arange(len(order))",
            ),
        ),
        ("tests/fitting/test_image_gate.py::test_pictures_take_some_levels_by_turns",),
    ),
    Mutation(
        "forged-signature",
        "a certificate with somebody else's content keeps its signature",
        (
            Text(
                "src/neuraleraser/evaluation/certificate.py",
                "if not is_signature(signature, data, brought):",
                "if False and not is_signature(signature, data, brought):",
            ),
        ),
        ("tests/evaluation/test_certificate.py::test_an_altered_figure_is_found",),
    ),
    Mutation(
        "certificate-of-more",
        "a certificate that leaves figures out agrees with its run",
        (
            Text(
                "src/neuraleraser/evaluation/certificate.py",
                "for key in {**figures, **found} if figures.get(key)",
                "for key in figures if figures.get(key)",
            ),
        ),
        ("tests/evaluation/test_certificate.py::test_one_that_is_made_up_is_found_by_the_run",),
    ),
    Mutation(
        "unfinished-certificate",
        "an evaluation that has not ended is certified",
        (
            Text(
                "src/neuraleraser/evaluation/certificate.py",
                "if not isinstance(versions, dict) or found != written:",
                "if not isinstance(versions, dict):",
            ),
        ),
        ("tests/evaluation/test_certificate.py::test_an_evaluation_that_has_not_ended_has_none",),
    ),
    Mutation(
        "picture-left-out",
        "`generate --image` draws from noise",
        (
            Text(
                "src/neuraleraser/cli/generate.py",
                "chosen, image=start)",
                "chosen, image=None if start is None else 0 * start)",
            ),
        ),
        ("tests/cli/test_generate.py::test_a_picture_to_start_from",),
    ),
    Mutation(
        "sld-threshold",
        "SLD acts where the prediction is far from the concept's",
        (
            Text(
                "src/neuraleraser/methods/safe_latent_diffusion.py",
                "torch.where(distance < m.threshold,",
                "torch.where(distance >= m.threshold,",
            ),
        ),
        ("tests/methods/test_safe_latent_diffusion.py::test_it_is_the_formula",),
    ),
    Mutation(
        "casteer-both-ways",
        "CASteer takes away what points from the concept, too",
        (Text("src/neuraleraser/methods/casteer.py", ".sum(-1, keepdim=True).clamp(min=0)", ".sum(-1, keepdim=True)"),),
        ("tests/methods/test_casteer.py::test_it_is_what_hooks_do_by_hand",),
    ),
    Mutation(
        "uce-nothing-preserved",
        "UCE forgets what it is to preserve",
        (
            Text(
                "src/neuraleraser/methods/unified_concept_editing.py",
                "target = target + self.preserve_scale * (old @ kept.T) @ kept",
                "target = target + 0 * (old @ kept.T) @ kept",
            ),
        ),
        ("tests/methods/test_unified_concept_editing.py::test_its_weights_are_the_minimum",),
    ),
    Mutation(
        "local-weight",
        "an object's guided correction pushes no more than a style's",
        (
            Text(
                "src/neuraleraser/fitting/image_gate.py",
                "(LOCAL_WEIGHT if local else 1)",
                "(1 if local else 1)",
            ),
        ),
        ("tests/fitting/test_image_gate.py::test_a_picture_part_of_generated_pictures",),
    ),
    Mutation(
        "drawn-twice",
        "a batch that another process has claimed is drawn here, too",
        (
            Text(
                "src/neuraleraser/evaluation/run_folder.py",
                "if c.key not in done] if mine else None",
                "if c.key not in done]",
            ),
        ),
        ("tests/test_together.py",),
    ),
)
