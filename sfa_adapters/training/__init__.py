"""Fine-tuning whole vision-language models: the Trainer, its optimizer and checks, checkpoints, runs."""
