"""The columns of a report's table: what each is called, how it is written, what it says."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["text", "number", "count", "share", "degrees", "chance"]
Group = Literal["place", "size", "rank", "spectrum", "base", "direction", "verdict"]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in the table and in files.
        title: on the page and in the terminal.
        group: which columns it belongs with.
        form: how it is written: a share is a fraction told in per cent, degrees are kept in radians.
        meaning: one or two sentences.
        needs: "base" where the base's weights are needed, "base svd" where its decomposition is, else "".
    """

    name: str
    title: str
    group: Group
    form: Form
    meaning: str
    needs: Literal["", "base", "base svd"] = ""


COLUMNS: tuple[Column, ...] = (
    Column("parameter", "parameter", "place", "text", "The parameter's name in the base model."),
    Column("module", "module", "place", "text", "The path of the module that owns it."),
    Column("stack", "stack", "place", "text", "What stands before the first number of its name."),
    Column("block", "block", "place", "count", "The first number in its name: the depth."),
    Column("kind", "kind", "place", "text", "Which matrix of its block it is."),
    Column("rows", "rows", "place", "count", "Outputs: the rows of the matrix (out, in)."),
    Column("columns", "columns", "place", "count", "Inputs: the columns of the matrix (out, in)."),
    Column("origin", "made by", "place", "text", "What made the difference: lora, dora, difference, …"),
    Column("norm", "norm", "size", "number", "The Frobenius norm of the difference ΔW."),
    Column(
        "relative_norm", "change", "size", "share",
        "The norm of ΔW over the norm of the base's matrix W.", "base",
    ),
    Column("spectral", "largest σ", "size", "number", "The largest singular value of ΔW."),
    Column(
        "relative_spectral", "largest σ over base's", "size", "share",
        "The largest singular value of ΔW over the largest of W.", "base",
    ),
    Column("nuclear", "nuclear norm", "size", "number", "The sum of the singular values of ΔW."),
    Column(
        "rank", "true rank", "rank", "count",
        "How many singular values of ΔW stand above the noise of rounding; exact for factors.",
    ),
    Column("rank_low", "rank, low", "rank", "count", "The low end of the interval for the true rank."),
    Column("rank_high", "rank, high", "rank", "count", "The high end of the interval for the true rank."),
    Column(
        "noise_edge", "noise edge", "rank", "number",
        "The largest singular value that rounding alone would give; 0 where nothing was rounded.",
    ),
    Column(
        "effective_rank", "effective rank", "rank", "number",
        "How many directions carry the update: exp of the entropy of σ / Σσ (Roy and Vetterli 2007).",
    ),
    Column(
        "effective_rank_above", "effective rank above noise", "rank", "number",
        "The same of the singular values above the noise alone.",
    ),
    Column(
        "stable_rank", "stable rank", "rank", "number",
        "Squared Frobenius norm over squared largest singular value.",
    ),
    Column(
        "participation_ratio", "participation ratio", "rank", "number",
        "(Σσ²)² / Σσ⁴: how many directions carry the energy.",
    ),
    Column(
        "energy_rank_90", "rank of 90 %", "rank", "count",
        "How many singular directions hold 90 % of the squared norm.",
    ),
    Column("energy_rank_99", "rank of 99 %", "rank", "count", "The same for 99 %."),
    Column(
        "entropy", "spectral entropy", "spectrum", "number",
        "The entropy of the spectrum over that of a flat one: 0 for one direction, 1 for all alike.",
    ),
    Column(
        "alpha", "power-law α", "spectrum", "number",
        "The exponent fitted to the tail of the spectrum of ΔWᵀΔW; nothing where the fit cannot be judged.",
    ),
    Column(
        "alpha_ks", "fit of α", "spectrum", "number",
        "Kolmogorov–Smirnov distance of that fit; less is better.",
    ),
    Column(
        "mp_spikes", "spikes", "spectrum", "count",
        "Singular values above the Marchenko–Pastur edge of ΔW's own bulk.",
    ),
    Column(
        "intruders_left", "intruders, outputs", "base", "count",
        "Left singular vectors of W + ΔW that resemble none of W's (Shuttleworth et al. 2024).", "base svd",
    ),
    Column(
        "intruders_right", "intruders, inputs", "base", "count",
        "Right singular vectors of W + ΔW that resemble none of W's.", "base svd",
    ),
    Column(
        "angle_left", "angle, outputs", "base", "degrees",
        "Smallest principal angle between the update's top output directions and the base's.", "base svd",
    ),
    Column(
        "angle_right", "angle, inputs", "base", "degrees",
        "Smallest principal angle between the update's top input directions and the base's.", "base svd",
    ),
    Column(
        "overlap_left", "overlap, outputs", "base", "share",
        "How much of the update's top output directions lies among the base's (Hu et al. 2021, Eq. 4).",
        "base svd",
    ),
    Column(
        "overlap_right", "overlap, inputs", "base", "share",
        "The same for input directions.", "base svd",
    ),
    Column(
        "chance_left", "chance, outputs", "base", "share",
        "The overlap that random output directions would have on average.", "base svd",
    ),
    Column("chance_right", "chance, inputs", "base", "share", "The same for input directions.", "base svd"),
    Column(
        "rank_slope", "base rank’s slope", "base", "number",
        "How fast the effective rank of W + tΔW rises with t at t = 0; below 0 the update lowers it.",
        "base svd",
    ),
    Column(
        "delta_magnitude", "ΔM", "direction", "number",
        "Mean change of length of the weight vectors of the outputs (Liu et al. 2024, DoRA).", "base",
    ),
    Column(
        "delta_direction", "ΔD", "direction", "number",
        "Mean of 1 − cosine between these vectors before and after (Liu et al. 2024, DoRA).", "base",
    ),
    Column(
        "verdict", "verdict", "verdict", "text",
        "Low rank, full rank, none (nothing but rounding) or unknown.",
    ),
    Column(
        "p_value", "p", "verdict", "chance",
        "The probability of what is seen if the verdict's opposite were true.",
    ),
)  # fmt: skip

TITLES = {column.name: column.title for column in COLUMNS}
