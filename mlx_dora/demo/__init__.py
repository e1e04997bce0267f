"""The demo: the complete workflow on a small real model and a small data set."""
