"""The demo: a real small model, a small real data set, and the whole job on them."""
