"""The page of an evaluation in a real browser: it draws, asks for nothing, and says what the table says."""

import base64

import numpy as np
import pytest
import torch

from geoedit.sliders.evaluation import Claim, Evaluation
from geoedit.sliders.evaluation.drawing import png
from geoedit.sliders.evaluation.page import page, payload
from tests.geoedit.browser import BROWSER, NAMES, Browser

SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)
MARKUP = "</script><b>size</b>"


def built():
    generator = np.random.default_rng(0)
    records = []
    for label, method, scales, rise in (
        (MARKUP, "slider", SCALES, 0.5),
        (MARKUP, "prompting", (-1.0, 0.0, 1.0), 0.4),
        ("hue", "slider", SCALES, -0.3),
    ):
        for seed in (0, 1):
            start = generator.normal(size=2)
            records += [
                {
                    "slider": label, "method": method, "seed": seed, "prompt": "a <i>bar</i>", "scale": scale,
                    "size": start[0] + rise * scale, "hue": start[1] + 0.1 * scale, "residual": 0.01,
                    "kind": 1.0, "distance": abs(scale),
                }
                for scale in scales
            ]  # fmt: skip
    image = base64.b64encode(png(torch.full((3, 8, 8), 90, dtype=torch.uint8))).decode()
    found = {
        "low": -1.5,
        "high": 0.9,
        "interval": [[-1.7, -1.2], [0.8, 1.0]],
        "reason": "it stops",
        "details": {},
    }
    return Evaluation(
        records=tuple(records),
        natural_sd={"size": 0.5, "hue": 1.0},
        claims={MARKUP: Claim("size"), "hue": Claim("size", -1, "largest effect")},
        within=(-1.0, 1.0),
        ranges={MARKUP: {"predicted": found, "observed": {**found, "high": None}}},
        compositions=({"composition": 0, "members": "a + b", "together": 1.2, "apart": 1.1, "error": 0.1},),
        pictures=(
            {
                "slider": MARKUP, "method": "slider", "scales": list(SCALES),
                "rows": [{"prompt": "a <i>bar</i>", "seed": 0, "images": [image] * len(SCALES)}],
            },
        ),
        notes=("One note.",),
        settings={"pipeline": "Some", "prompts": ["a <i>bar</i>"], "seeds": [0, 1], "scales": list(SCALES)},
    )  # fmt: skip


def test_names_from_outside_are_no_markup():
    text = page(built())
    assert text.count("</script>") == 2 and "<b>size" not in text and "http://www.w3.org/2000/svg" in text
    data = payload(built())
    assert data["sliders"][0]["images"][1]["change"]["size"][-1] == pytest.approx(
        1.0
    )  # 0.5 over an sd of 0.5
    assert data["interference"]["signed"][0]["values"]["hue"] == pytest.approx(0.2 / 2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"), "--disable-3d-apis")
    yield found
    found.close()


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed here")
@pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
def test_the_page_draws_and_answers(phone, browser, tmp_path):
    found = built()
    path = found.to_html(tmp_path / "page.html")
    options = {"width": 390, "height": 780, "dark": True, "touch": True} if phone else {}
    shown = browser.open(path, **options)
    assert shown.complaints() == [] and shown.requests() == []
    assert shown.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert shown.run("document.querySelectorAll('#strips img').length") == len(SCALES)
    assert shown.run("[...document.querySelectorAll('#strips img')].every((i) => i.naturalWidth === 8)")
    assert MARKUP in shown.text("#strip-lead")
    assert (
        shown.run("document.querySelectorAll('#figure-own path').length") == 2 + 1
    )  # images, and their mean
    assert shown.run("document.querySelectorAll('#figure-safe circle').length") == 2 + 1
    shown.run("document.getElementById('after').click()")
    assert "lowers size" in shown.text("#curves-lead")
    shown.run(
        "const s = document.getElementById('which'); s.value = 'each'; s.dispatchEvent(new Event('change'))"
    )
    assert shown.run("document.querySelectorAll('#table tbody tr').length") == len(found.table)
    shown.close()
