"""The methods of merging, by rows or element by element, on plain tensors."""
