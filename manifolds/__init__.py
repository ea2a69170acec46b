"""Geometry: sets with tangent spaces, tensors in and tensors out.

This floor knows no model. It imports torch and numerical libraries only, so that everything here can be
checked against closed forms. Floors above it may import it; it imports none of them.
"""
