"""Sites: what they accept, how they read, and that a saved one is the same one."""

from __future__ import annotations

import json

import pytest

from geoedit.errors import EditError
from geoedit.site import Site

SITES = [
    Site(3),
    Site(-1, "heads", "value", head=2),
    Site(0, "mlp_hidden", -2, stack="decoder"),
    Site(stream="embedding", token="all"),
    Site(module="model.layers.0.mlp:input", token=4),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_site_survives_json(site: Site) -> None:
    back = Site.from_dict(json.loads(json.dumps(site.to_dict())))
    assert back == site
    assert hash(back) == hash(site)
    assert {site: "found"}[back] == "found"


def test_sites_that_differ_in_one_field_are_different_keys() -> None:
    sites = [*SITES, Site(3, token="all"), Site(3, token=3), Site(3, "residual_in"), Site(3, stack="encoder")]
    assert len(set(sites)) == len(sites)


def test_words() -> None:
    assert str(Site(2, "attention_out", 5, stack="encoder")) == "encoder block 2 attention_out @ 5"
    assert str(Site(stream="embedding")) == "embedding @ last"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "needs a block"),
        ({"block": True}, "integer"),
        ({"block": 1, "stream": "resid"}, "streams are"),
        ({"block": 1, "token": "first"}, "token is one of"),
        ({"block": 1, "token": True}, "token is one of"),
        ({"block": 1, "head": 0}, "goes with stream='heads'"),
        ({"block": 1, "stream": "heads", "head": -1}, "counted from 0"),
        ({"block": 1, "stream": "embedding"}, "belongs to no block"),
        ({"block": 1, "module": "lm_head"}, "leave out"),
        ({"module": ""}, "non-empty"),
    ],
)
def test_impossible_sites_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(EditError, match=words):
        Site(**fields)


def test_a_callable_token_works_as_key_but_is_not_saved() -> None:
    def first(input_ids, real):
        return real.int().argmax(1)

    site = Site(1, token=first)
    assert {site: 1}[Site(1, token=first)] == 1
    assert str(site) == "block 1 residual_out @ <first>"
    with pytest.raises(EditError, match="cannot be saved"):
        site.to_dict()


def test_a_saved_site_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(EditError, match="no field 'layer'"):
        Site.from_dict({"layer": 3})
