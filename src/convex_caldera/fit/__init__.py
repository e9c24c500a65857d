"""Algorithms, one idea per file; `backfit.fit_layer` drives them as a recipe says."""
