"""Experiments: training small models and asking them, quantisation, parity of text models."""
