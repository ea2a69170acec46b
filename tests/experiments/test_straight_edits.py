import json

import numpy as np
from sklearn.metrics import roc_auc_score

import geoedit
from experiments.straight_edits import Settings, page, run


def test_the_study_writes_what_a_diagnosis_says(tmp_path):
    settings = Settings(models=("almanac-gpt2",), concepts=("weekdays",), max_edits=60, folder=tmp_path)
    (entry,) = run(settings)
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    diagnosis = geoedit.diagnose(model, tokenizer, world.concepts["weekdays"], apply=True, max_edits=60)
    table = diagnosis.table
    success = table["success"].to_numpy(bool)
    assert entry["seen"] == round(float(success.mean()), 4)
    margin = np.nan_to_num(table["norm"].to_numpy(float))
    assert abs(entry["auroc"]["norm"][0] - roc_auc_score(success, margin)) < 1e-4
    saved = json.loads((tmp_path / "straight_edits.json").read_text())
    assert saved["results"] == [entry] and saved["settings"]["max_edits"] == 60
    assert (tmp_path / "straight_edits.md").read_text() == page([entry])
    assert str(tmp_path) not in json.dumps(saved)
