"""Pipelines seen through their denoiser, whatever their family."""
