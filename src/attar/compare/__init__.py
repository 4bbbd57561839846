"""Comparison: does it help my network, on my data?"""
