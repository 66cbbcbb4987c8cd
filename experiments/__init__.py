"""The experiments: one small module per paper, `python -m experiments.<slug>`."""
