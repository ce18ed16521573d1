"""What serves a run: the training loop, its files, devices and processes, features, figures, errors."""
