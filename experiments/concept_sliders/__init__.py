"""Text sliders of the drawn shapes, from several seeds in both families, scored on held-out prompts."""
