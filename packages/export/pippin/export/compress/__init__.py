"""Compression of weights: configs in `config`, recipes in `recipes`, the whole of it in `compress`."""
