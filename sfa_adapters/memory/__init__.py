"""GPU memory of a training run, predicted from its recipe before anything is downloaded."""
