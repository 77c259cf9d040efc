"""The mathematics of KTO on plain tensors and integers. Knows no mesh, no model, no file."""
