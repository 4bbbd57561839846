"""Comparison: does it help my network, on my data? An honest, priced answer."""
