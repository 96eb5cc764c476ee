"""Texts to calibrate and to measure on, by kind: read, brought through a template, cut into sequences."""
