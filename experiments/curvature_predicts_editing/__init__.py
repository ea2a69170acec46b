"""Does curvature predict where straight edits fail? `python -m experiments.curvature_predicts_editing` asks."""
