"""`analyse` against numpy, scipy and brute force on the dense matrices; what it keeps, shares and refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from manifolds import LowRank
from peft_analysis import Report, UpdateError, Weights, WeightUpdate, analyse
from peft_analysis.report import COLUMNS, measure
from peft_analysis.report.names import place
from peft_analysis.report.processes import Processes

ROOT = Path(__file__).parents[2]
SHAPES = {"attn.q_proj": (24, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40)}
RANKS = {"attn.q_proj": 1, "mlp.up_proj": 2, "mlp.down_proj": 4}


def drawn(device="cpu", dtype=torch.float32, blocks=2, scale=0.3):
    """A base and factors of known rank for every matrix of a few blocks, and a vector."""
    draw = torch.Generator().manual_seed(5)
    base, change = {}, {}
    for block in range(blocks):
        for kind, (m, n) in SHAPES.items():
            name = f"model.layers.{block}.{kind}.weight"
            base[name] = torch.randn(m, n, generator=draw).to(device, dtype)
            left, right = (torch.randn(size, generator=draw) for size in ((m, RANKS[kind]), (RANKS[kind], n)))
            change[name] = LowRank((scale * (1 + block) * left).to(device), right.to(device))
    base["model.norm.weight"] = torch.full((24,), 2.0, device=device, dtype=dtype)
    change["model.norm.weight"] = torch.full((24,), 0.5, device=device)
    return base, change


def update_of(base, change, **facts):
    return WeightUpdate.from_tensors(change, base=Weights.of_tensors(base), **facts)


@pytest.fixture(scope="module")
def report():
    return analyse(None, update_of(*drawn()), progress=False, name="five")


def numbers_of(report):
    """The numbers of a table, NaN where there is none."""
    names = [column.name for column in COLUMNS if column.form != "text"]
    return report.table[names].astype("float64").to_numpy()


def dense(value):
    return (value.dense() if isinstance(value, LowRank) else value).double().cpu().numpy()


def test_every_row_says_what_the_dense_matrices_say(device):
    base, change = drawn(device)
    table = analyse(None, update_of(base, change), progress=False, top=5).table
    assert list(table.columns) == [column.name for column in COLUMNS] and len(table) == 6
    for row in table.itertuples():
        delta, below = dense(change[row.parameter]), dense(base[row.parameter])
        u, values, v = np.linalg.svd(delta, full_matrices=False)
        bu, bs, bv = np.linalg.svd(below, full_matrices=False)
        rank = RANKS[row.kind]
        shares = values[:rank] / values.sum()
        assert (row.rank, row.rank_low, row.rank_high, row.verdict) == (rank, rank, rank, "low rank")
        assert (row.rows, row.columns) == delta.shape
        assert row.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert row.relative_norm == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(below), rel=1e-5)
        assert row.nuclear == pytest.approx(values.sum(), rel=1e-5)
        assert row.relative_spectral == pytest.approx(values[0] / bs[0], rel=1e-5)
        assert row.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert row.effective_rank_above == pytest.approx(row.effective_rank, rel=1e-4)
        assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        for side, mine, theirs in (("left", u[:, :rank], bu[:, :5]), ("right", v[:rank].T, bv[:5].T)):
            angle, found = getattr(row, f"angle_{side}"), getattr(row, f"overlap_{side}")
            assert angle == pytest.approx(scipy.linalg.subspace_angles(mine, theirs)[-1], abs=1e-4)
            assert found == pytest.approx(np.linalg.norm(mine.T @ theirs) ** 2 / rank, rel=1e-4)
        tuned = np.linalg.svd(below + delta)
        for side, mine, theirs in (("left", tuned[0], bu), ("right", tuned[2].T, bv.T)):
            new = (np.abs(mine[:, :10].T @ theirs).max(1) < 0.5).sum()
            assert getattr(row, f"intruders_{side}") == new
        after = below + delta
        lengths = np.linalg.norm(after, axis=1) - np.linalg.norm(below, axis=1)
        cosines = (after * below).sum(1) / np.linalg.norm(after, axis=1) / np.linalg.norm(below, axis=1)
        assert row.delta_magnitude == pytest.approx(np.abs(lengths).mean(), rel=1e-4)
        assert row.delta_direction == pytest.approx((1 - cosines).mean(), rel=1e-4)


@pytest.mark.parametrize("top", [2, 16])
def test_chance_is_the_mean_overlap_of_random_directions(top):
    base, change = drawn(blocks=1)
    found = analyse(None, update_of(base, change), only="down_proj", top=top, progress=False)
    (row,) = found.rows
    left, _, right = np.linalg.svd(dense(base[row["parameter"]]))
    draw, count = np.random.default_rng(0), min(row["rank"], top)
    for side, space, width in (("left", left, row["rows"]), ("right", right.T, row["columns"])):
        seen = []
        for _ in range(400):
            other = np.linalg.qr(draw.standard_normal((width, count)))[0]
            seen.append(np.linalg.norm(other.T @ space[:, :top]) ** 2 / count)
        assert row[f"chance_{side}"] == pytest.approx(np.mean(seen), rel=0.05)


def test_a_rounded_difference_keeps_its_rank_and_its_unchanged_matrices_count_for_nothing():
    base, change = drawn(blocks=3, scale=0.02)
    half = {name: value.bfloat16() for name, value in base.items()}
    low = {name: value for name, value in change.items() if "up_proj" in name}
    tuned = {
        name: (value.float() + low[name].dense() if name in low else value).bfloat16()
        for name, value in half.items()
    }
    found = analyse(Weights.of_tensors(half), Weights.of_tensors(tuned), progress=False)
    table = found.table.set_index("parameter")
    assert (table.loc[list(low), "rank"] == 2).all() and (table.loc[list(low), "verdict"] == "low rank").all()
    assert (table.loc[list(low), "effective_rank"] > 2.5).all()
    assert (table.loc[list(low), "effective_rank_above"] <= 2).all()
    assert (table.loc[~table.index.isin(low), "verdict"] == "none").all()
    for row in (row for row in found.rows if row["verdict"] == "low rank"):
        values = np.linalg.svd(dense(low[row["parameter"]]))[1]
        assert row["noise_edge"] < 1.05 * values[1] and row["noise_edge"] > 0
    assert found.verdict["origin"] == "merged LoRA" and found.verdict["rank"] == 2


def test_without_a_base_what_is_relative_is_missing_and_said():
    found = analyse(None, WeightUpdate.from_tensors(drawn()[1]), progress=False)
    needs = [column.name for column in COLUMNS if column.needs]
    assert found.table[needs].isna().all().all() and found.base is None
    assert found.table[["norm", "rank", "effective_rank"]].notna().all().all()
    (left,) = found.left_out
    assert left["matrices"] == 6 and "not given" in left["why"]


def test_large_bases_are_left_out_and_said():
    found = analyse(None, update_of(*drawn()), max_base_side=23, progress=False)
    assert found.table["intruders_left"].isna().all() and found.table["relative_norm"].notna().all()
    assert found.left_out[0]["matrices"] == 6 and "max_base_side = 23" in found.left_out[0]["why"]


def test_changes_that_are_no_matrices_are_listed(report):
    (norm,) = report.vectors
    assert norm["parameter"] == "model.norm.weight" and norm["relative_norm"] == pytest.approx(0.25)


def test_zero_and_empty_updates():
    base, change = drawn()
    nothing = {name: value * 0.0 for name, value in change.items()}
    found = analyse(None, update_of(base, nothing), progress=False)
    assert (found.table["norm"] == 0).all() and (found.table["rank"] == 0).all() and not found.vectors
    assert found.left_out == () and found.verdict["origin"] == "none"
    empty = analyse(None, WeightUpdate({}), progress=False)
    assert len(empty.table) == 0 and empty.verdict is None


def test_only_and_device_and_dtype(device):
    base, change = drawn(dtype=torch.bfloat16)
    update = update_of(base, change)
    found = analyse(None, update, only="up_proj", device=device, progress=False)
    assert list(found.table["kind"]) == ["mlp.up_proj"] * 2 and not found.vectors
    with pytest.raises(UpdateError, match="nowhere"):
        analyse(None, update, only=["nowhere"], progress=False)


@pytest.mark.parametrize("where", ["factor", "vector", "base"])
def test_values_that_are_not_finite_are_refused_by_name(where):
    base, change = drawn()
    name = "model.norm.weight" if where == "vector" else "model.layers.1.mlp.up_proj.weight"
    value = {"factor": lambda: change[name].left, "vector": lambda: change[name], "base": lambda: base[name]}[
        where
    ]()
    value.view(-1)[3] = math.nan
    with pytest.raises(UpdateError, match=name):
        analyse(None, update_of(base, change), progress=False)


def test_a_base_of_another_shape_is_refused():
    base, change = drawn()
    name = "model.layers.0.mlp.up_proj.weight"
    update = update_of(base, change)
    update.base = Weights.of_tensors(base | {name: torch.zeros(40, 23)})
    with pytest.raises(UpdateError, match=rf"{name}.*\(40, 24\).*\(40, 23\)"):
        analyse(None, update, progress=False)


@pytest.mark.parametrize(
    ("setting", "text"), [({"top": 0}, "top is 0"), ({"k": 0}, "k is 0"), ({"epsilon": 0.0}, "epsilon"),
                          ({"max_base_side": -1}, "max_base_side")],
)  # fmt: skip
def test_wrong_settings(setting, text):
    with pytest.raises(UpdateError, match=text):
        analyse(None, update_of(*drawn()), progress=False, **setting)


# What is kept


class Counted:
    """Counts the matrices that are measured; stops like Ctrl-C after so many."""

    def __init__(self, monkeypatch, most=math.inf):
        self.names, self.most, self.real = [], most, measure.measure
        monkeypatch.setattr(sys.modules["peft_analysis.analyse"], "measure", self)

    def __call__(self, update, name, *args, **options):
        if len(self.names) >= self.most:
            raise KeyboardInterrupt
        self.names.append(name)
        return self.real(update, name, *args, **options)


def test_a_stopped_analysis_goes_on(tmp_path, monkeypatch, report):
    update = update_of(*drawn())
    first = Counted(monkeypatch, most=4)
    with pytest.raises(KeyboardInterrupt):
        analyse(None, update, resume=tmp_path, progress=False)
    first.most, first.names = math.inf, []
    found = analyse(None, update, resume=tmp_path, progress=False)
    assert len(first.names) == 2 and found.rows == report.rows
    first.names = []
    again = analyse(None, update, resume=tmp_path, progress=False)
    assert first.names == [] and again.rows == found.rows and again.verdict == found.verdict
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changed", ["update", "base", "setting", "file"])
def test_a_row_of_other_inputs_is_computed_anew(tmp_path, monkeypatch, changed):
    base, change = drawn()
    name = "model.layers.0.mlp.up_proj.weight"
    analyse(None, update_of(base, change), resume=tmp_path, progress=False)
    again = Counted(monkeypatch)
    options = {}
    if changed == "update":
        change[name].right[0, 0] += 1e-4
    if changed == "base":
        base[name][0, 0] += 1e-4
    if changed == "setting":
        options["epsilon"] = 0.6
    if changed == "file":
        (kept,) = tmp_path.glob("*0.mlp.up_proj*")
        kept.write_text(kept.read_text()[:-20])
    analyse(None, update_of(base, change), resume=tmp_path, progress=False, **options)
    assert again.names == (
        [name] if changed != "setting" else [row for row in change if row != "model.norm.weight"]
    )


def test_the_cache_of_bases_is_used_again(tmp_path, monkeypatch, report):
    update = update_of(*drawn())
    analyse(None, update, cache=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    monkeypatch.setattr("peft_analysis.base_svd.BaseSVD.of", lambda *_, **__: pytest.fail("decomposed again"))
    again = analyse(None, update, cache=tmp_path, progress=False)
    assert np.allclose(numbers_of(again), numbers_of(report), rtol=1e-5, equal_nan=True)


def test_resume_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UpdateError, match="is a file"):
        analyse(None, update_of(*drawn()), resume=tmp_path / "file")


def test_the_bar_counts_bytes(capsys):
    analyse(None, update_of(*drawn(), rounded=torch.float32), progress=True)
    numbers = 2 * sum(m * n for m, n in SHAPES.values())
    assert f"{4 * numbers / 1000:.1f}k/{4 * numbers / 1000:.1f}k" in capsys.readouterr().err


# Files and figures


def test_json_comes_back_as_it_was(report, tmp_path):
    path = report.to_json(tmp_path / "new" / "report.json")
    again = Report.load(path)
    assert again == report and again.table.equals(report.table)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"format": "other"}', '{"format": "peft_analysis.report", "version": 99}']
)
def test_other_files_are_no_report(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UpdateError, match=r"other\.json"):
        Report.load(tmp_path / "other.json")
    with pytest.raises(UpdateError, match="can't read"):
        Report.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["change", "ranks", "intruders", "spectra", "angles"])
def test_figures(report, name, tmp_path):
    figure = report.figure(name)
    figure.savefig(tmp_path / f"{name}.png")
    assert figure.axes[0].has_data() and (tmp_path / f"{name}.png").stat().st_size > 5000


def test_figures_that_cannot_be(report):
    with pytest.raises(UpdateError, match="there are change, ranks"):
        report.figure("pie")
    alone = analyse(None, WeightUpdate.from_tensors(drawn()[1]), progress=False)
    for name in ("intruders", "angles"):
        with pytest.raises(UpdateError, match="give the base"):
            alone.figure(name)


@pytest.mark.parametrize(
    ("name", "stack", "block", "kind"),
    [
        ("encoder.block.3.layer.1.DenseReluDense.wi.weight", "encoder.block", 3, "layer.*.DenseReluDense.wi"),
        ("down_blocks.1.attentions.0.to_out.0.weight", "down_blocks", 1, "attentions.*.to_out.0"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h", 11, "attn.c_attn"),
        ("embed_tokens.weight", "", None, "embed_tokens"),
        ("weight", "", None, "weight"),
        ("0.weight", "", 0, "0"),
    ],
)
def test_places(name, stack, block, kind):
    found = place(name)
    assert (found.stack, found.block, found.kind) == (stack, block, kind)


# Processes


def test_shares_are_whole_disjoint_and_even():
    costs = {f"m{i}": float(1 + (i * 37) % 11) for i in range(50)}
    shares = [Processes(rank, 3).share(costs) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 1


WORKER = """
import sys, json
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from peft_analysis import UpdateError, WeightUpdate, analyse, Weights
torch.set_num_threads(1)
folder = Path(sys.argv[1])
update = WeightUpdate.load(folder / "update.safetensors")
update.base = Weights.of(folder / "base.safetensors")
report = analyse(None, update, resume=folder / "rows", progress=False)
from accelerate import PartialState
rank = PartialState().process_index
report.to_json(folder / f"{rank}.json")
broken = {name: update[name] * (float("nan") if "1.mlp.up_proj" in name else 1.0) for name in update}
try:
    analyse(None, WeightUpdate.from_tensors(broken), progress=False)
except UpdateError as error:
    (folder / f"{rank}.error").write_text(str(error))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_matrices_and_both_have_the_report(tmp_path, report):
    from safetensors.torch import save_file

    base, change = drawn()
    save_file(base, tmp_path / "base.safetensors")
    WeightUpdate.from_tensors(change).save(tmp_path / "update.safetensors")
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, tmp_path / "worker.py", tmp_path, ROOT],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    both = [Report.load(tmp_path / f"{rank}.json") for rank in range(2)]
    assert both[0].rows == both[1].rows and both[0].settings["processes"] == 2
    numbers = [column.name for column in COLUMNS if column.form != "text"]
    expected = report.table[numbers].astype("float64").to_numpy()
    assert np.allclose(
        both[0].table[numbers].astype("float64").to_numpy(), expected, rtol=1e-5, equal_nan=True
    )
    assert both[0].verdict["evidence"] == both[1].verdict["evidence"]
    for rank in range(2):
        assert "1.mlp.up_proj" in (tmp_path / f"{rank}.error").read_text()
