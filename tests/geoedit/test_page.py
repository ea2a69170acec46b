"""The page in a real browser: it draws, asks nobody for anything, and does by hand what the numbers say."""

import math
from dataclasses import replace

import numpy as np
import pytest

from geoedit import Concept, Site, Template, diagnose
from tests.conftest import build_gpt2
from tests.geoedit.browser import BROWSER, NAMES, Browser

MONTHS = ("january", "february", "march", "april", "may", "june")
SITES = [Site(1, token="value"), Site(2)]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed here"),
]


@pytest.fixture(scope="module")
def diagnosed(tiny_tokenizer):
    """The months of a model that knows none, with names that would be markup: applied, and predicted only."""
    after = [*MONTHS[1:], MONTHS[0]]
    templates = [Template("after {value} comes", after), Template("the month after {value} is", after)]
    concept = Concept("months & <b>more</b>", MONTHS, templates, "cycle")
    model = build_gpt2(len(tiny_tokenizer))
    options = {"max_edits": 40, "progress": False, "name": "<i>tiny</i>"}
    return {
        applied: diagnose(model, tiny_tokenizer, concept, SITES[: 1 + applied], apply=applied, **options)
        for applied in (True, False)
    }


@pytest.fixture(scope="module")
def files(diagnosed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {applied: found.to_html(folder / f"{applied}.html") for applied, found in diagnosed.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all, without any WebGL: nothing on the page needs it."""
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
    """The applied page; the tests that share it compare what changes."""
    yield from opened(browser, files[True])


@pytest.fixture(scope="module")
def phone(browser, files):
    """The same on a phone in the dark, under fingers."""
    yield from opened(browser, files[True], width=390, height=780, dark=True, touch=True)


@pytest.fixture(scope="module")
def predicted(browser, files):
    """The page of a diagnosis that ran no edit."""
    yield from opened(browser, files[False])


class Shown:
    """What the page shows now of the edit that it follows, beside what the diagnosis says of it."""

    def __init__(self, page, diagnosis):
        self.page = page
        site, kind, number = page.run(
            "['site', 'kind', 'sweep'].map((id) => document.getElementById(id).value)"
        )
        label = diagnosis.sites[int(site)].label
        kinds = list(dict.fromkeys(diagnosis.table["edit"]))
        self.site = diagnosis.sites[int(site)]
        mine = [s for s in diagnosis.sweeps if s["site"] == label and s["edit"] == kinds[int(kind)]]
        self.sweep = mine[int(number)]

    @property
    def index(self):
        """Which of its scales is shown; the page may show no other."""
        scale = float(self.page.run("document.getElementById('explorer').dataset.scale"))
        return self.sweep["scales"].index(pytest.approx(scale, abs=1e-9))

    def points(self):
        return self.page.run("""(() => {
            const circle = (node) => [Number(node.getAttribute("cx")), Number(node.getAttribute("cy"))];
            const moved = (node) => node.getAttribute("transform").match(/-?[0-9.]+/g).map(Number);
            const means = [...document.querySelectorAll("#space .mean")].map(circle);
            return { means, foot: circle(document.querySelector("#space .foot")),
                     goal: circle(document.querySelector("#space .goal")),
                     handle: moved(document.getElementById("handle")),
                     along: moved(document.querySelector("#space .along")) };
        })()""")

    def check_words(self):
        """The readout tells this scale's numbers, and an answer only where the edit was run."""
        at, sweep = self.index, self.sweep
        scale = sweep["scales"][at]
        assert float(self.page.text("#at-scale")) == pytest.approx(scale, abs=1e-4)
        assert says(self.page.text("#at-odds"), sweep["probability"][at])
        off = self.page.text("#at-off")
        assert (
            off == "unknown"
            if sweep["off"][at] is None
            else (float(off.removesuffix(" × noise")) == pytest.approx(sweep["off"][at], rel=6e-3, abs=1e-6))
        )
        answer, note = self.page.text("#at-answer"), self.page.text("#at-note")
        here = [entry for entry in sweep["recorded"] if math.isclose(entry["scale"], scale)]
        near = min(sweep["recorded"], key=lambda entry: (abs(entry["scale"] - scale), entry["scale"]))
        told = f"“{near['answer']}”" + (", as wanted" if near["success"] else "")
        if here:
            assert answer == told and (note == "") == near["success"]
        else:
            assert answer == "not run here"
            assert note == f"Nearest that was run, scale {near['scale']:g}: {told}."

    def check_picture(self):
        """The drawn points are the diagnosis's own points in three dimensions, seen from one side."""
        drawn, at, sweep = self.points(), self.index, self.sweep
        known = np.array([(*point, 0.0, 0.0, 0.0)[:3] for point in self.site.coordinates])
        means = np.array(drawn["means"])
        # Means are drawn from far to near: find which is which by the goodness of the view through all.
        points = [("handle", sweep["position"][at]), ("goal", sweep["target_position"])]
        if sweep["foot"] is not None:
            points.append(("foot", sweep["foot"][at]))
        names = self.page.run("document.querySelectorAll('#space .mean').length")
        assert names == len(known) == len(means)
        order = self.page.run(
            "[...document.querySelectorAll('#space .mean')].map((n) => Number(n.dataset.value))"
        )
        view, *_ = np.linalg.lstsq(np.c_[known[order], np.ones(len(known))], means, rcond=None)
        assert np.abs(np.c_[known[order], np.ones(len(known))] @ view - means).max() < 0.05
        for name, point in points:
            assert np.abs([*point, 1.0] @ view - drawn[name]).max() < 0.6, name
        if sweep["geodesic"] is not None:
            way = np.clip(sweep["scales"][at], 0, 1) * 16
            low = min(int(way), 15)
            a, b = (np.array(sweep["geodesic"]["position"][step]) for step in (low, low + 1))
            assert np.abs([*(a + (way - low) * (b - a)), 1.0] @ view - drawn["along"]).max() < 0.6


def path_ends(page):
    """The two ends of the straight path on the screen: x, y, x, y."""
    return page.run("""(() => {
        const line = document.querySelector("#space .straight");
        return ["x1", "y1", "x2", "y2"].map((name) => Number(line.getAttribute(name)));
    })()""")


def box_of(page, name):
    """Left, top and width of an element in the window."""
    return page.run(f"""(() => {{
        const box = document.getElementById({name!r}).getBoundingClientRect();
        return [box.x, box.y, box.width];
    }})()""")


def says(text, probability):
    """Whether a text in per cent tells a probability, and tells no certainty that is none."""
    if probability < 0.005 and probability > 0:
        return text.startswith("under 1")
    if 0.995 < probability < 1:
        return text.startswith("over 99")
    return abs(float(text.removesuffix("\u00a0%")) - 100 * probability) <= 0.51


@pytest.mark.parametrize(("name", "figures"), [("desk", "8"), ("phone", "8"), ("predicted", "5")])
def test_the_page_draws(request, name, figures):
    page = request.getfixturevalue(name)
    small = name == "phone"
    drawn = page.run("[document.body.dataset.figuresWanted, document.body.dataset.figuresDrawn]")
    assert drawn == [figures, figures]
    assert page.complaints() == [] and page.requests() == []
    assert page.run("document.documentElement.scrollWidth") <= (390 if small else 1280)
    assert page.text("h1") == "Can a straight edit move months & <b>more</b>?"
    for tag, only in (("b", ".chip b"), ("i", ".bar i")):
        count = "document.querySelectorAll({!r}).length".format
        assert page.run(count(f"main {tag}")) == page.run(count(only)), "a name became markup"
    crossing = page.run("""(() => {
        const boxes = [...document.querySelectorAll("#space .label")].map((n) => n.getBoundingClientRect());
        return boxes.some((a, i) => boxes.slice(0, i).some((b) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
    })()""")
    assert not crossing
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)") == small


def test_dragging_the_handle_moves_the_state_along_its_path(desk, diagnosed):
    shown = Shown(desk, diagnosed[True])
    start = desk.middle("#handle .knob")
    ends = path_ends(desk)
    shown.check_words()
    shown.check_picture()
    first = shown.index
    assert shown.sweep["scales"][first] == 1
    end = [start[0] + 0.45 * (ends[2] - ends[0]), start[1] + 0.45 * (ends[3] - ends[1])]

    def look():
        shown.check_words()
        return shown.index, shown.points()["handle"]

    seen = desk.drag(start, end, look=look)
    indices = [index for index, _ in seen]
    assert indices == sorted(indices) and len(set(indices)) > 5 and indices[-1] > first
    along = np.array([ends[2] - ends[0], ends[3] - ends[1]])
    scales = np.array(shown.sweep["scales"])
    for index, place in seen:
        share = (scales[index] - scales[0]) / (scales[-1] - scales[0])
        assert np.abs(np.array(ends[:2]) + share * along - place).max() < 0.1
    assert abs(scales[indices[-1]] - 1.9) < 0.1
    shown.check_picture()
    back = desk.middle("#handle .knob")
    desk.drag(back, [back[0] - 2 * along[0], back[1] - 2 * along[1]])
    assert shown.index == 0
    shown.check_words()


def test_the_slider_and_the_handle_answer_to_keys(desk, diagnosed):
    shown = Shown(desk, diagnosed[True])
    last = len(shown.sweep["scales"]) - 1
    for node in ("scale", "handle"):
        desk.run(f"document.getElementById('{node}').focus()")
        desk.press("Home")
        assert shown.index == 0
        for key, expected in (
            ("ArrowRight", 1),
            ("ArrowUp", 2),
            ("PageUp", 6),
            ("ArrowLeft", 5),
            ("PageDown", 1),
        ):
            desk.press(key)
            assert shown.index == expected, (node, key)
            shown.check_words()
        desk.press("End")
        assert shown.index == last
        desk.press("ArrowRight")
        assert shown.index == last
        label = desk.run(f"document.getElementById('{node}').getAttribute('aria-valuetext')")
        assert label.startswith("scale 2: ")
        shown.check_picture()
    ring = "getComputedStyle(document.querySelector('#handle .grip')).strokeWidth"
    assert desk.run("document.activeElement.id") == "handle" and desk.run(ring) == "2.5px"


def test_every_recorded_answer_is_shown_at_its_scale(desk, diagnosed):
    shown = Shown(desk, diagnosed[True])
    chips = desk.run("document.querySelectorAll('#recorded [data-run]').length")
    assert chips == len(shown.sweep["recorded"]) > 5
    for number, entry in enumerate(shown.sweep["recorded"]):
        desk.run(f"document.querySelector('#recorded [data-run=\"{number}\"]').click()")
        assert shown.sweep["scales"][shown.index] == entry["scale"]
        shown.check_words()
    if shown.sweep["geodesic"] is not None:
        texts = desk.run("[...document.querySelectorAll('#recorded [data-share]')].map((n) => n.textContent)")
        expected = [
            f"{round(100 * e['scale'])}\u00a0% {'✓' if e['success'] else '✗'} {e['answer']}"
            for e in shown.sweep["geodesic"]["recorded"]
        ]
        assert texts == expected


def test_a_chart_and_the_slider_follow_the_mouse(desk, diagnosed):
    shown = Shown(desk, diagnosed[True])
    middle = desk.middle("#chart-odds")
    desk.drag(middle, [middle[0] + 60, middle[1]], steps=3)
    chart = shown.index
    left, _, width = box_of(desk, "chart-odds")
    share = (middle[0] + 60 - left - 48) / (width - 48 - 16)
    assert abs(shown.sweep["scales"][chart] - 2 * share) <= 1 / 32 + 1e-6
    x, y = desk.middle("#scale")
    desk.drag([x, y], [x - 70, y], steps=4)
    assert shown.index < chart
    shown.check_words()
    shown.check_picture()


def test_turning_the_picture_keeps_its_truth_and_the_scale(desk, diagnosed):
    shown = Shown(desk, diagnosed[True])
    before, index = shown.points(), shown.index
    left, top, _ = box_of(desk, "space")
    corner = [left + 20, top + 20]
    desk.drag(corner, [corner[0] + 90, corner[1] + 40])
    assert shown.index == index and shown.points()["means"] != before["means"]
    shown.check_picture()
    desk.run("document.getElementById('space').focus()")
    turned = shown.points()["means"]
    desk.press("ArrowRight")
    assert shown.index == index and shown.points()["means"] != turned
    shown.check_picture()


def test_another_site_and_edit_are_followed(desk, diagnosed):
    for site in range(len(SITES)):
        for kind in (0, 1):
            desk.run(f"""for (const [id, value] of [["site", {site}], ["kind", {kind}]]) {{
                const node = document.getElementById(id);
                node.value = String(value);
                node.dispatchEvent(new Event("change"));
            }}""")
            shown = Shown(desk, diagnosed[True])
            assert shown.sweep["text"] in desk.text("#sentence")
            shown.check_words()
            shown.check_picture()


def test_a_finger_drags_the_handle(phone, diagnosed):
    shown = Shown(phone, diagnosed[True])
    x, y = phone.middle("#handle .knob")
    ends = path_ends(phone)
    before, top = shown.index, phone.run("scrollY")
    phone.swipe([x, y], [x - 0.3 * (ends[2] - ends[0]), y - 0.3 * (ends[3] - ends[1])])
    assert shown.index < before and phone.run("scrollY") == top
    assert abs(shown.sweep["scales"][shown.index] - 0.4) < 0.11
    shown.check_words()
    shown.check_picture()


def test_a_page_without_edits_tells_no_answer(predicted, diagnosed):
    assert predicted.text("#at-answer") == "not run"
    marks = "#recorded button, #chart-odds .hit, #chart-odds .miss, #space .hit, #space .miss"
    assert predicted.run(f"document.querySelectorAll({marks!r}).length") == 0
    sweep = Shown(predicted, diagnosed[False]).sweep
    assert says(predicted.text("#at-odds"), sweep["probability"][sweep["scales"].index(1.0)])


@pytest.mark.parametrize("known", [True, False], ids=["all-known", "nothing-known"])
def test_geometry_draws_whatever_is_known_of_it(browser, diagnosed, tmp_path, known):
    found = {
        "curvature": 0.5,
        "snr": 9.0,
        "reliable": True,
        "reach": 2.0,
        "noise": 0.1,
        "functional": {"radius": 1.2},
    }
    found["dimension"] = {"value": 1.0, "low": 1.0, "high": 2.0}
    geometry = found if known else {"reliable": False, "reason": "too <b>few</b>"}
    sites = tuple(replace(site, geometry=geometry) for site in diagnosed[True].sites)
    path = replace(diagnosed[True], sites=sites).to_html(tmp_path / "page.html")
    for page in opened(browser, path, width=390, height=780):
        points = page.run("document.querySelectorAll('#figure-geometry .points path').length")
        assert points == 4 * len(sites)
        broken = "[...document.querySelectorAll('svg *')].some((n) => /NaN/.test(n.getAttribute('d') ?? ''))"
        assert not page.run(broken)
