"""The page in a real browser: it loads without an error, asks nobody for anything, and every figure draws."""

import re
import shutil
import subprocess

import pytest

from geoedit import Concept, Site, Template, diagnose

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path is not None), None)
MONTHS = ("january", "february", "march", "april", "may", "june")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed here"),
]


def open_page(path, profile, *flags):
    """The page's document after its script ran, and what the browser logged."""
    quiet = [
        f"--{name}"
        for name in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-component-update", "enable-logging=stderr",
        )
    ]  # fmt: skip
    deaf = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [BROWSER, *quiet, deaf, f"--user-data-dir={profile}", *flags, "--dump-dom", path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    body = re.search(r"<body[^>]*>", found.stdout)
    assert body is not None, found.stderr[-2000:]
    return dict(re.findall(r'data-([a-z-]+)="([^"]*)"', body[0])), found.stdout, found.stderr


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize(
    "flags", [("--enable-unsafe-swiftshader",), ("--disable-3d-apis",)], ids=["gl", "no-gl"]
)
def test_the_page_draws(tiny_gpt2, tiny_tokenizer, tmp_path, applied, flags):
    after = [*MONTHS[1:], MONTHS[0]]
    templates = [Template("after {value} comes", after), Template("the month after {value} is", after)]
    concept = Concept("months & <b>more</b>", MONTHS, templates, "cycle")
    sites = [Site(stream="embedding", token="value"), Site(1, token="value"), Site(2)]
    found = diagnose(
        tiny_gpt2,
        tiny_tokenizer,
        concept,
        sites,
        apply=applied,
        max_edits=60,
        progress=False,
        name="<i>tiny</i>",
    )
    state, document, log = open_page(found.to_html(tmp_path / "page.html"), tmp_path / "profile", *flags)
    assert state.get("ready") == "true", log[-2000:]
    assert "problems" not in state, state
    assert state["figures-wanted"] == state["figures-drawn"] == ("6" if applied else "3")
    console = [line for line in log.splitlines() if "CONSOLE" in line and "GL Driver Message" not in line]
    assert not [line for line in console if re.search(r"error|uncaught|refused|failed", line, re.IGNORECASE)]
    assert "ERR_" not in log
    assert "<b>more</b>" not in document.split("</style>")[1].split("<script>")[0]
    assert (state["webgl"] == "false") == ("has no WebGL" in document.split("<script>")[0])
    if "--disable-3d-apis" in flags:
        assert state["webgl"] == "false"
