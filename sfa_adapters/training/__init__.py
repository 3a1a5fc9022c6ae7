"""Fine-tuning and evaluating whole vision-language models: recipes, device plans, data, training, sharing."""
