"""The report's page in a real browser: it draws, asks nobody for anything, shows the report's own numbers."""

import csv
import io
import json
import math

import pytest
import torch

from manifolds import LowRank
from peft_analysis import Weights, WeightUpdate, analyse
from peft_analysis.report import COLUMNS
from tests.geoedit.browser import BROWSER, NAMES, Browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed here"),
]

KINDS = ("attn.q_proj", "mlp.<b>up</b>", "mlp.down_proj")
BLOCKS = 3


@pytest.fixture(scope="module")
def reports():
    """With its base (one matrix unchanged, one with an intruder), and the same alone."""
    draw = torch.Generator().manual_seed(2)
    base, change = {}, {}
    for block in range(BLOCKS):
        for number, kind in enumerate(KINDS):
            name = f"model.layers.{block}.{kind}.weight"
            base[name] = torch.randn(30, 24, generator=draw)
            rank = number + 1 + block
            left, right = torch.randn(30, rank, generator=draw), torch.randn(rank, 24, generator=draw)
            change[name] = LowRank(left * (0.05 * (1 + number)), right)
    change["model.layers.0.attn.q_proj.weight"] *= 0.0
    change["model.layers.2.mlp.down_proj.weight"] *= 30.0
    base["lm_head.weight"] = torch.randn(50, 24, generator=draw)
    change["lm_head.weight"] = LowRank(torch.randn(50, 1, generator=draw), torch.randn(1, 24, generator=draw))
    base["norm.weight"], change["norm.weight"] = torch.ones(24), torch.full((24,), 0.1)
    whole = WeightUpdate.from_tensors(change, base=Weights.of_tensors(base))
    return {
        "desk": analyse(None, whole, progress=False, name="<i>tiny</i>"),
        "alone": analyse(None, WeightUpdate.from_tensors(change), progress=False),
    }


@pytest.fixture(scope="module")
def files(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: report.to_html(folder / f"{name}.html") for name, report in reports.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"), "--disable-3d-apis")
    yield found
    found.close()


def opened(browser, path, **options):
    page = browser.open(path, **options)
    yield page
    assert page.complaints() == [] and page.requests() == []
    page.close()


@pytest.fixture(scope="module")
def desk(browser, files):
    yield from opened(browser, files["desk"])


@pytest.fixture(scope="module")
def phone(browser, files):
    yield from opened(browser, files["desk"], width=390, height=780, dark=True, touch=True)


@pytest.fixture(scope="module")
def alone(browser, files):
    yield from opened(browser, files["alone"])


def set_value(page, node, value):
    page.run(f"""(() => {{
        const node = document.getElementById({node!r});
        node.value = {json.dumps(value)};
        for (const kind of ["input", "change"]) node.dispatchEvent(new Event(kind));
    }})()""")


def listed(page):
    """The rows of the table on the page, by their place in the report."""
    return page.run("[...document.querySelectorAll('#table tbody tr')].map((row) => Number(row.dataset.row))")


def cell(page, row, column):
    return page.run(f"""(() => {{
        const heads = [...document.querySelectorAll("#table thead button")].map((one) => one.dataset.column);
        const row = document.querySelector('#table tbody tr[data-row="{row}"]');
        return row.children[heads.indexOf({column!r})].textContent;
    }})()""")


def says(text, value):
    """Whether a number on the page tells a value to three digits."""
    power = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789", "\u00a0%°")).replace("−", "-")
    head, _, exponent = power.partition("·10") if "·10" in power else (power, "", "0")
    return math.isclose(float(head) * 10 ** int(exponent or 0), value, rel_tol=6e-3, abs_tol=1e-9)


@pytest.mark.parametrize(("name", "figures"), [("desk", "6"), ("phone", "6"), ("alone", "4")])
def test_the_page_draws(request, name, figures):
    page = request.getfixturevalue(name)
    small = name == "phone"
    drawn = page.run("[document.body.dataset.figuresWanted, document.body.dataset.figuresDrawn]")
    assert drawn == [figures, figures]
    assert page.complaints() == [] and page.requests() == []
    assert page.run("document.documentElement.scrollWidth") <= (390 if small else 1280)
    assert page.run("document.querySelectorAll('main b').length") == 0, "a name became markup"
    assert not page.run("""[...document.querySelectorAll("svg *")].some((node) =>
        [...node.attributes].some((one) => /NaN|Infinity/.test(one.value)))""")
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)") == small


def test_it_says_what_the_report_says(desk, reports):
    report = reports["desk"]
    assert desk.text("h1") == "What <i>tiny</i> changed"
    assert "9 matrices changed" in desk.text("#headline")
    shown = listed(desk)
    table = report.table
    assert shown == list(table["relative_norm"].sort_values(ascending=False).index)
    for place in shown:
        row = report.rows[place]
        assert says(cell(desk, place, "relative_norm"), 100 * row["relative_norm"])
        assert cell(desk, place, "rank") == str(row["rank"])
        for name in ("intruders_left", "intruders_right"):
            text = cell(desk, place, name)
            assert text == ("–" if row.get(name) is None else str(row[name]))
    assert max(row.get("intruders_left") or 0 for row in report.rows) > 0


def test_the_maps_show_every_matrix(desk, reports):
    for figure, value in (
        ("figure-map", lambda row: row["relative_norm"] if row["norm"] else None),
        (
            "figure-intruders",
            lambda row: (
                None if "intruders_left" not in row else row["intruders_left"] + row["intruders_right"]
            ),
        ),
    ):
        known = desk.run(
            f"[...document.querySelectorAll('#{figure} .cell:not(.none)')].map((n) => Number(n.dataset.row))"
        )
        assert sorted(known) == [i for i, row in enumerate(reports["desk"].rows) if value(row) is not None]
    place = desk.run("document.querySelector('#figure-map .cell:not(.none)').dataset.row")
    desk.mouse("mouseMoved", *desk.middle(f"#figure-map .cell[data-row='{place}']"), held=False)
    tip = desk.text("#tip").splitlines()
    row = reports["desk"].rows[int(place)]
    assert not desk.run("document.getElementById('tip').hidden") and row["kind"] in tip[0]
    assert says(tip[1].removeprefix("change: "), 100 * row["relative_norm"])


def test_a_pressed_cell_shows_its_matrix(desk, reports):
    for place in (4, 0, 8):
        node = f"#figure-map .cell[data-row='{place}']"
        x, y = desk.middle(node)
        desk.mouse("mousePressed", x, y)
        desk.mouse("mouseReleased", x, y)
        row = reports["desk"].rows[place]
        assert desk.text("#one-lead") == row["parameter"]
        told = desk.run("[...document.querySelectorAll('#readout dd')].map((n) => n.textContent)")
        assert told[0] == f"{row['rows']} × {row['columns']}" and str(row["rank"]) in told
        assert desk.run("document.getElementById('matrix').value") == str(place)
        if not row["norm"]:
            assert "zero" in desk.text("#figure-spectrum")
            continue
        curves = desk.run("document.querySelectorAll('#figure-spectrum .curve').length")
        dots = desk.run("document.querySelectorAll('#figure-angles .point').length")
        assert curves == 2 and dots == sum(len(side) for side in row["curves"]["angles"].values()) > 0


def test_keys_and_steps_go_from_matrix_to_matrix(desk, reports):
    set_value(desk, "matrix", "3")
    desk.run("document.getElementById('after').click()")
    assert desk.text("#one-lead") == reports["desk"].rows[4]["parameter"]
    desk.run("document.getElementById('before').focus()")
    desk.run("document.activeElement.click()")
    assert desk.text("#one-lead") == reports["desk"].rows[3]["parameter"]
    set_value(desk, "matrix", "0")
    assert desk.run("document.getElementById('before').disabled")


@pytest.mark.parametrize(
    ("text", "query"),
    [("rank <= 3", "rank <= 3"), ("change > 20 %", "relative_norm > 0.2"), ("true rank = 3", "rank == 3"),
     ("down_proj rank>3", "rank > 3 and kind == 'mlp.down_proj'"), ("lm_head", "kind == 'lm_head'"),
     ("nothing like it", "rank < 0")],
)  # fmt: skip
def test_the_filter_is_a_query(desk, reports, text, query):
    set_value(desk, "filter", text)
    assert sorted(listed(desk)) == sorted(reports["desk"].table.query(query).index)
    set_value(desk, "filter", "")
    assert len(listed(desk)) == len(reports["desk"].rows)


def test_headings_sort(desk, reports):
    table = reports["desk"].table
    for column in ("rank", "intruders_left", "relative_norm"):
        for up in (False, True):
            desk.run(f"document.querySelector('#table [data-column=\"{column}\"]').click()")
            found = table.loc[listed(desk), column].dropna().tolist()
            assert found == sorted(found, reverse=not up)
    assert desk.run("document.querySelector('#table [aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_what_is_saved_is_the_table(desk, reports):
    desk.run("""(() => {
        window.saved = [];
        URL.createObjectURL = (blob) => { window.saved.push(blob.text()); return "#"; };
        HTMLAnchorElement.prototype.click = () => {};
    })()""")
    set_value(desk, "filter", "down_proj")
    desk.run("document.getElementById('save-csv').click()")
    desk.run("document.getElementById('save-json').click()")
    text, again = desk.run("Promise.all(window.saved)")
    set_value(desk, "filter", "")
    table = reports["desk"].table
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [column.name for column in COLUMNS]
    assert len(rows) == BLOCKS == len(json.loads(again))
    for row in rows:
        known = table[table["parameter"] == row["parameter"]].iloc[0]
        for column in COLUMNS:
            value = known[column.name]
            if row[column.name] == "":
                assert value is None or value != value or str(value) == "<NA>"
            elif column.form != "text":
                assert math.isclose(float(row[column.name]), float(value), rel_tol=1e-5, abs_tol=1e-12)


def test_without_a_base_the_page_says_what_is_missing(alone):
    assert "were not given" in alone.text("#aligned-lead") and "were not given" in alone.text(
        "#left-out-list"
    )
    assert "not given" in alone.text("#figure-angles")
    options = alone.run("[...document.querySelectorAll('#map-column option')].map((n) => n.value)")
    assert options[0] == "norm" and "relative_norm" not in options


def test_a_finger_chooses_a_matrix(phone, reports):
    x, y = phone.middle("#ranking li:nth-child(2) button")
    phone.swipe([x, y], [x, y], steps=1)
    order = reports["desk"].table["relative_norm"].sort_values(ascending=False).index
    phone.wait(f"document.getElementById('matrix').value === '{order[1]}'")
    assert phone.text("#one-lead") == reports["desk"].rows[order[1]]["parameter"]


def test_an_empty_update_has_a_page(browser, tmp_path):
    path = analyse(None, WeightUpdate({}), progress=False).to_html(tmp_path / "empty.html")
    for page in opened(browser, path):
        assert "No matrix" in page.text("#headline") and not page.run("!!document.querySelector('svg')")
    assert path.stat().st_size < 100_000


def test_figures_of_many_matrices_are_one_of_each_block_and_kind(browser, tmp_path):
    """Experts share a cell; a stack of blocks beside another has columns of its own."""
    draw = torch.Generator().manual_seed(0)
    names = [
        f"{stack}.{i}.mlp.experts.{e}.up.weight"
        for stack in ("enc", "dec")
        for i in (0, 1, 10)
        for e in range(4)
    ]
    change = {
        name: LowRank(torch.randn(6, 1, generator=draw), torch.randn(1, 5, generator=draw)) for name in names
    }
    report = analyse(None, WeightUpdate.from_tensors(change), progress=False)
    for page in opened(browser, report.to_html(tmp_path / "experts.html")):
        assert page.run("document.querySelectorAll('#figure-map .cell').length") == 6
        places = page.run("""[...document.querySelectorAll("#figure-map .cell")].map((node) =>
            [Number(node.getAttribute("x")), Number(node.dataset.row)])""")
        order = [report.rows[row]["parameter"].split(".mlp")[0] for _, row in sorted(places)]
        assert order == ["enc.0", "enc.1", "enc.10", "dec.0", "dec.1", "dec.10"]
