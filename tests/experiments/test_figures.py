import matplotlib.image
import numpy as np

import geoedit
from experiments.figures import draw

DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]


def test_picture_shows_what_was_observed(tiny_model, tiny_tokenizer, tmp_path):
    after = [*DAYS[1:], DAYS[0]]
    texts = ["the day after {value} is", "after {value} comes"]
    days = geoedit.Concept("days", DAYS, [geoedit.Template(text, after) for text in texts], "cycle")
    sites = [geoedit.Site(0, token="value"), geoedit.Site(1, token="value"), geoedit.Site(1)]
    diagnosis = geoedit.diagnose(tiny_model, tiny_tokenizer, days, sites, apply=True, max_edits=20)
    path = draw(diagnosis, tmp_path / "new" / "days.png", dpi=60)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[:2] == (252, 600)
    for half in np.split(image, 2, axis=1):
        assert (half.min(2) < 0.7).mean() > 0.01  # ink on both sides
    assert list(path.parent.iterdir()) == [path]
