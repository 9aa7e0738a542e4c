"""Labelled training: terms by which a concept that is known by label gets features of its own.

Labels [M, C] say 1 where a map shows a concept and 0 where it does not. A map is the B / M consecutive vectors of
the batch that come from one image: one vector alone where M = B. A label that holds for an image need not hold for
every position of it, so vectors are pooled over the map first.

Binding makes one feature fire where its concept is: a detector. That this feature also carries the concept, rather than
leaving it to features for its single cases, takes the Matryoshka architecture, where the bound features, being first,
have to reconstruct by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from neuraleraser.errors import DataError
from neuraleraser.sae.sparse_ops import Weights

TEMPERATURE = 0.07
SHARED_LABEL_WEIGHT = 4.0  # what a negative counts that shares some labels, but not all
MAPS_AT_ONCE = 512  # maps that are contrasted at a time: the work grows with their square


def binding_loss(pre: Tensor, labels: Tensor, threshold: Tensor | float) -> Tensor:
    """Distance of feature c from firing just where concept c is (scalar), from pre [B, C] of the first C features,
    labels [M, C], and the threshold `threshold` (a number or [C]), held fixed:

        v    = max over the map's vectors of pre_c - threshold
        L_c  = mean of -log sigmoid(v) over the maps with c, / 2 + mean of -log sigmoid(-v) over those without, / 2
        loss = mean of L_c over the concepts

    After SAEmnesia (arXiv 2509.21379), L_CA = -mean over maps and their concepts of log sigmoid(v): one feature is
    bound to each concept. Three things are ours: maps without the concept count too, each side as much as the other
    (with positives alone a feature that fires everywhere is as good); v is taken from the threshold, so that
    sigmoid = 1/2 is where the feature starts to fire; and feature c is given to label c before training, and starts
    from `concept_directions`, where SAEmnesia looks for the best features of a finished dictionary. (In one trial,
    three planted concepts of four cases each: balanced accuracy 0.66 to 0.82 from random rows, 0.92 to 1.00 else.)
    """
    v = pre.unflatten(0, (len(labels), -1)).amax(1) - threshold
    with_c, without = labels.to(v), 1 - labels.to(v)
    hit = (softplus(-v) * with_c).sum(0) / with_c.sum(0).clamp_min(1)
    miss = (softplus(v) * without).sum(0) / without.sum(0).clamp_min(1)
    return (hit + miss).mean() / 2


def contrast_loss(pre: Tensor, labels: Tensor) -> Tensor:
    """Likeness of maps of other labels against maps of the same (scalar), from pre [B, n] and labels [M, C]:

        r    = mean over the map's vectors of ReLU(pre), divided by its norm
        loss = -mean over i and over p in P(i) of log( exp(r_i r_p / t) / sum over a != i of w_ia exp(r_i r_a / t) )

    P(i) are the other maps with exactly i's labels; w_ia = 4 for maps that share some labels with i but not all,
    else 1; t = 0.07. Maps without a label are no anchors i, but are among the a; 0 where no map has a partner.
    SAEParate (arXiv 2605.12122); the pooling over positions is uniform here.
    """
    r = normalize(pre.relu().unflatten(0, (len(labels), -1)).mean(1), dim=1)
    y = labels.to(r)
    shared, size = y @ y.T, y.sum(1)
    alike = (shared == size) & (shared == size[:, None]) & (size > 0)
    weight = torch.where((shared > 0) & ~alike, SHARED_LABEL_WEIGHT, 1.0).to(r).log().fill_diagonal_(-torch.inf)
    partners = alike.fill_diagonal_(False).to(r)
    anchors = partners.sum(1) > 0
    if not bool(anchors.any()):
        return pre.new_zeros(())
    like = r @ r.T / TEMPERATURE
    log_p = like - (like + weight).logsumexp(1, keepdim=True)
    return -((log_p * partners).sum(1) / partners.sum(1).clamp_min(1))[anchors].mean()


def concept_directions(x: Tensor, labels: Tensor, otherwise: Tensor) -> Tensor:
    """The directions [C, d] of norm 1 from the mean of the vectors x [N, d] without concept c to the mean of those
    with it, by labels [N, C]: where the bound features start. A row of `otherwise` [C, d] where one side is empty."""
    y = labels.to(x)
    with_c, without = y.sum(0)[:, None], (1 - y).sum(0)[:, None]
    gap = (y.T @ x) / with_c - ((1 - y).T @ x) / without
    known = (with_c > 0) & (without > 0) & (gap.norm(dim=1, keepdim=True) > 0)
    return normalize(torch.where(known, gap, otherwise), dim=1)


def fisher_features(
    x: Tensor, labels: Tensor, otherwise: Weights, shrink: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder rows [C, d], biases [C] and decoder rows [C, d] of features that each read one label, from vectors
    x [N, d] with labels [N, C], in closed form:

        g_c = mean of x with c - mean of x without,    S = covariance of x + shrink * its mean eigenvalue * I
        w_c = S^-1 g_c * |g_c| / (g_c^T S^-1 g_c),     pre_c = w_c (x - mean without c),     d_c = g_c / |g_c|

    Fisher's linear discriminant (1936) as an encoder row, scaled so that pre_c is 0 on average without c and |g_c|
    with it: what the decoder row d_c has to add. Along g_c itself the other concepts spread widest; S^-1 looks where
    they do not, which tells two concepts of one image apart. (Rows of a trained dictionary do not: on the canvas's
    two-object prompts ridge regression over all 512 features ranked objects with an area under the curve of 0.77 to
    0.88, each of these rows alone with 0.997.) A row of `otherwise` stands where a label is never, or always, 1.
    """
    y, c = labels.to(x), x - x.mean(0)
    spread = c.T @ c / len(c)
    eye = torch.eye(len(spread), device=x.device)
    with_c, without = y.sum(0)[:, None], (1 - y).sum(0)[:, None]
    absent = (1 - y).T @ x / without.clamp_min(1)
    gap = y.T @ x / with_c.clamp_min(1) - absent
    rows = torch.linalg.solve(spread + shrink * spread.diagonal().mean() * eye, gap.T).T
    rows = rows * (gap.norm(dim=1) / (rows * gap).sum(1))[:, None]
    known = (with_c > 0) & (without > 0) & rows.isfinite().all(1, keepdim=True)
    concepts = slice(0, labels.shape[1])
    w_enc = torch.where(known, rows, otherwise.W_enc[concepts])
    b_enc = torch.where(known[:, 0], -(rows * (absent - otherwise.b_dec)).sum(1), otherwise.b_enc[concepts])
    return w_enc, b_enc, torch.where(known, normalize(gap, dim=1), otherwise.W_dec[concepts])


def check_labels(labels: Tensor, vectors: int, n: int, concepts: int | None, batch: int) -> None:
    """Raise DataError, naming the batch, unless `labels` fit its vectors, an SAE of n features and earlier batches,
    which had this many concepts (None: there were none)."""
    shape = tuple(labels.shape)
    if len(shape) != 2 or 0 in shape or vectors % shape[0]:
        raise DataError(
            f"batch {batch} has labels {shape} for {vectors} vectors: pass [M, C], M a divisor of {vectors}"
        )
    if shape[1] > n:
        raise DataError(f"batch {batch} has labels for {shape[1]} concepts, more than the n = {n} features: raise n")
    if concepts is not None and shape[1] != concepts:
        raise DataError(f"batch {batch} has labels for {shape[1]} concepts: batches before had {concepts}")
    if bad := int(((labels != 0) & (labels != 1)).sum()):
        raise DataError(f"batch {batch} has {bad} labels that are neither 0 nor 1 (NaN counts as such)")
