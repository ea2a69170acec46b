import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from geoedit.diagnosis import Diagnosis, Predictor, SiteSummary
from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR
from geoedit.report import expectation_table, page, predictor_table, site_table, verdict
from geoedit.report.page import embed
from geoedit.report.payload import payload
from geoedit.report.shapes import swept
from geoedit.report.verdict import join_blocks

VALUES = ["north", "east", "south", "</script><script>alert(1)</script>"]
LABELS = ["embedding @ value", "block 0 residual_out @ value", "block 1 residual_out @ last"]


def made_up_geometry(depth, points):
    """A site that knows all of its geometry, one that does not know its bends, one without a manifold."""
    if depth == 2:
        return {"path": [], "path_shape": [0], "reason": "too few <b>points</b>", "reliable": False}
    return {
        "dimension": {"value": 1.2, "low": 1.0, "high": 2.0, "method": "local PCA", "reason": ""},
        "kind": "path-cloud", "closed": True, "path": points, "path_shape": [4], "note": "", "reach": 2.0,
        "curvature": None if depth else 0.5, "snr": 0.1 if depth else 9.0, "reliable": not depth,
        "noise": 0.1, "reason": "noise hides the bend" if depth else "",
        "functional": {"ratio": 0.4, "radius": 1.25, "reason": ""},
        "safe_low": {MEAN_DIFFERENCE: 0.6, REUSED_VECTOR: None},
        "safe_scale": {MEAN_DIFFERENCE: 1.4, REUSED_VECTOR: 0.0},
        "advice": "geodesic", "advice_reason": "it turns <i>far</i>",
    }  # fmt: skip


def made_up_sweep(label, applied):
    scales = [0.0, 0.5, 1.0, 2.0]
    return {
        "site": label, "edit": MEAN_DIFFERENCE, "template": 0, "source": "north", "target": VALUES[3],
        "from_value": "north", "to_value": VALUES[3], "text": "facing north <i>", "wanted": VALUES[3],
        "scales": scales, "probability": [0.0, 0.25, 0.75, 0.25], "off": [0.9, 2.0, None, 8.0],
        "position": [[s, 2 * s, -s] for s in scales], "foot": [[s, s, 0.0] for s in scales],
        "target_position": [1.0, 2.0, -1.1],
        "recorded": [{"scale": 1.0, "answer": "<b>", "success": False}] if applied else [],
        "geodesic": None, "reason": "no way <b>through</b>",
    }  # fmt: skip


def made_up(applied=True, rates=(0.98, 0.5, 0.02)):
    """A diagnosis of made-up numbers, with a value that would be markup if it were not escaped."""
    draw = np.random.default_rng(0)
    rows, sites = [], []
    for depth, (label, rate) in enumerate(zip(LABELS, rates, strict=True)):
        place, token = label.split(" @ ")
        points = draw.normal(size=(4, 3)).tolist()
        shares = [0.5, 0.3, 0.1]
        sites.append(
            SiteSummary(
                label, {}, place, token, depth, points, shares, 1.0, 0.5, 0.8, made_up_geometry(depth, points)
            )
        )
        for kind in (MEAN_DIFFERENCE, REUSED_VECTOR):
            for source in VALUES:
                for target in VALUES:
                    if source != target:
                        success = bool(draw.random() < rate)
                        margin = draw.normal() + 2 * success - 1
                        rows.append(
                            {
                                "site": label, "edit": kind, "template": 0,
                                "source": source, "target": target,
                                "from_value": source, "to_value": target, "scale": 1.0,
                                "landing": margin, "norm": draw.normal(),
                                "probability": 1 / (1 + np.exp(-margin)),
                                "nearest": source, "success": success if applied else None,
                                "answer": target if success else source,
                                "log_odds_change": margin if applied else np.nan,
                            }
                        )  # fmt: skip
    table = pd.DataFrame(rows).astype({"success": "boolean"})
    concept = {"name": "compass <b>", "kind": "cycle", "description": "", "values": VALUES}
    return Diagnosis(
        model="a model & more",
        concept={**concept, "templates": ["facing {value} <i>"]},
        sites=tuple(sites),
        table=table,
        predictors=(
            Predictor("landing", "landing", "What it is."),
            Predictor("norm", "length", "A baseline."),
        ),
        settings={"edits_per_site": 24, "max_edits": 600},
        versions={"torch": "2"},
        notes=("A note.",),
        sweeps=tuple(made_up_sweep(label, applied) for label in LABELS),
    )


@pytest.mark.parametrize(
    ("rates", "word"), [((0.98, 0.5, 0.02), "Yes"), ((0.5, 0.3, 0.0), "Partly"), ((0.0, 0.0, 0.0), "No")]
)
def test_the_verdict_answers_first(rates, word):
    found = verdict(made_up(rates=rates))
    assert found.headline.startswith(f"{word}:") and "compass <b>" in found.headline
    told = " ".join(found.lines)
    if word == "No":  # the deepest of the sites, which has no manifold
        assert "How far" not in told and "Advice" not in told and "can't be judged" in found.lines[-1]
        return
    assert "mean differences are expected to arrive at scales from 0.6 to 1.4" in told
    assert "reused vectors are expected to arrive at no scale" in told
    assert "Advice there: geodesic (it turns <i>far</i>)." in found.lines


def test_a_verdict_without_edits_says_that_none_was_run():
    found = verdict(made_up(applied=False))
    assert "expected to arrive" in found.headline and "No edit was run" in found.lines[-1]


def test_runs_of_blocks_are_joined():
    sites = [f"block {number} residual_out @ value" for number in (0, 1, 2, 4)] + ["embedding @ value"]
    assert join_blocks(sites) == [
        "blocks 0–2 residual_out @ value",
        "block 4 residual_out @ value",
        "embedding @ value",
    ]


@pytest.mark.parametrize("applied", [True, False])
def test_tables_fit_eighty_columns(applied):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = made_up(applied)
    for table in (
        site_table(found),
        predictor_table(found),
        expectation_table(found.predict("north", "east")),
    ):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and all(label in text for label in LABELS)
    assert ("seen" in text) is True and ("AUROC" in text) is True


def test_the_payload_is_json_and_its_numbers_are_the_tables():
    diagnosis = made_up()
    found = json.loads(json.dumps(payload(diagnosis), allow_nan=False))
    table = diagnosis.table
    part = table[(table["site"] == LABELS[1]) & (table["edit"] == REUSED_VECTOR)]
    assert found["sites"][1]["rates"][REUSED_VECTOR]["observed"] == pytest.approx(
        part["success"].mean(), abs=1e-4
    )
    source, target, count, probability, *_, rate, _ = found["pairs"][LABELS[1]][REUSED_VECTOR][0]
    row = part[(part["source"] == source) & (part["target"] == target)]
    assert (count, rate) == (1, float(row["success"].iloc[0]))
    assert probability == pytest.approx(row["probability"].iloc[0], abs=1e-4)
    assert sum(entry[2] for entry in found["calibration"]["bins"]) == len(table)
    curve = found["roc"]["landing"]
    assert curve[0] == [0.0, 0.0] and curve[-1] == [1.0, 1.0]


def test_a_payload_without_edits_holds_no_observation():
    found = payload(made_up(applied=False))
    assert found["calibration"] is None and found["roc"] == {} and found["sweeps"][0]["recorded"] == []


def test_a_sweep_travels_whole_and_says_where_it_is_safe():
    found = payload(made_up())["sweeps"][0]
    assert found["path"] == [[0, 0, 0], [2, 4, -2]] and found["target_value"] == VALUES[3]
    assert found["off"] == [0.9, 2.0, None, 8.0] and found["recorded"][0]["success"] is False
    # 0.25 at 0.5, 0.75 at 1 and 0.25 at 2: one half is passed half-way each time.
    assert found["safe"] == pytest.approx([0.75, 1.5])
    never = {**made_up_sweep(LABELS[0], True), "probability": [0.1, None, 0.2, 0.3]}
    assert swept(never)["safe"] is None
    assert swept({**never, "probability": [None] * 4})["safe"] is None


def test_a_result_without_sweeps_or_geometry_still_makes_a_page(tmp_path):
    old = made_up().to_dict()
    del old["sweeps"]
    for site in old["sites"]:
        del site["geometry"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = Diagnosis.from_json(tmp_path / "old.json")
    assert found.sweeps == () and "</html>" in page(found)
    assert not [line for line in verdict(found).lines if line.startswith(("How far", "Advice"))]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            (tag, name, value) for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]


def test_the_page_loads_nothing_and_names_are_no_markup():
    text = page(made_up())
    elements = Elements()
    elements.feed(text)
    assert elements.tags.count("script") == 3 and "iframe" not in elements.tags
    assert elements.links == [("link", "href", "data:,")]
    assert "<script>alert(1)" not in text and "compass &lt;b&gt;" in text
    assert "@import" not in text.split("<script>")[0] and "url(" not in text.split("<script>")[0]


def test_embedded_json_cannot_end_its_script():
    data = {"a": "</script><!-- \u2028", "b": [1, None]}
    text = embed(data)
    assert "<" not in text and "\u2028" not in text and json.loads(text) == data


def test_html_is_written_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = made_up().to_html(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="disk full"):
        made_up(applied=False).to_html(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
